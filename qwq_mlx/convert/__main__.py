"""`python -m qwq_mlx.convert --source DIR --output DIR`: a checkpoint becomes packed MLX weights.

The result goes to stdout, as text or with --json as one line; plan, progress and warnings go to stderr. Arguments are
read before anything heavy is imported, so --help answers at once. An interrupted run says how to go on.

Does not: convert anything itself (`qwq_mlx.convert.job` does).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_mlx.cli.command import Command, add_output, how_to_go_on, make_parser, run_command
from qwq_mlx.cli.generate_flags import CHAT_TEMPLATE, FOLLOW_LINKS
from qwq_mlx.convert.calibration import BUNDLED
from qwq_mlx.errors import OptionError
from qwq_mlx.quant import DEFAULT_RECIPE

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.progress import ConvertProgress
    from qwq_mlx.progress import ProgressBar

_PHASES = {
    "compile": "compiling, once on a machine",
    "calibrate": "calibrating",
    "convert": "converting",
    "check": "reading back",
    "quality": "measuring",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _convert, interrupted=how_to_go_on)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "convert",
        description="Convert a Qwen2 checkpoint (QwQ-32B-Preview) to packed MLX weights, in bounded memory. "
        "An interrupted conversion goes on where it was when the same command runs again.",
        exit_codes="0 done, 1 failed, 2 wrong usage, 3 disk full, 129 terminal closed, 130 interrupted (Ctrl-C), 143 "
        "terminated",
    )
    add = parser.add_argument
    add(
        "--source",
        metavar="DIR",
        required=True,
        help="checkpoint folder, a GGUF (FILE.gguf, ollama:NAME[:TAG], lmstudio:PUBLISHER/REPO), or a Hub repository "
        "(Qwen/QwQ-32B-Preview), downloaded shard by shard",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of the repository (default: main)")
    add("--output", metavar="DIR", required=True, action=_Once, help="output folder")
    _add_packing(parser)
    add("--chat-template", metavar="FILE", help=CHAT_TEMPLATE + " (default: the source's)")
    add("--follow-links", action="store_true", help=FOLLOW_LINKS)
    add("--force", action="store_true", help="replace an existing output once the new one is complete")
    add("--restart", action="store_true", help="discard an unfinished conversion instead of continuing it")
    add("--keep-source", action="store_true", help="keep what is downloaded in OUTPUT.source")
    add("--dry-run", action="store_true", help="show the plan and stop")
    add(
        "--workers",
        type=int,
        metavar="N",
        dest="n_workers",
        help="number of quantization threads (default: one per core)",
    )
    _add_quality(parser)
    add_output(parser, json="print the result as one line of JSON")
    return parser


def _add_packing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipe",
        metavar="NAME",
        action=_Once,
        help=f"recipe name under conversions/, or the path of a .toml file (default: {DEFAULT_RECIPE}; a quantized "
        "GGUF keeps its codes where MLX can hold them)",
    )
    add(
        "--scale-dtype",
        metavar="TYPE",
        help="type of the scales and biases that a GGUF becomes: bfloat16, float16 or float32 (default: bfloat16; "
        "float32 is exact for every type that keeps its codes, float16 for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0)",
    )
    add(
        "--target-size",
        metavar="SIZE",
        dest="target_bytes",
        help="choose the bits of every matrix so that the output fits this size, as 17GB (also GiB, MB, MiB): the "
        "recipe's mode, fit and overrides stay, groups are its own or larger; the output matrix, narrow matrices and "
        "the layers where rounding hurts most get more (default: the recipe's bits)",
    )
    add(
        "--calibrate",
        metavar="TEXT",
        nargs="?",
        const=BUNDLED,
        help="a text, or .jsonl of {text}, {messages} or {prompt, response}, or of what generate --input wrote: the "
        "layers are run on it as they are packed, one in memory, and each is fitted so that it gives what it gave "
        "(at least 512 tokens, 65,536 are used, without a GPU 16,384; from the Hub every shard is fetched twice, "
        "or once with --keep-source; takes minutes, of which --quiet shows nothing; without TEXT what "
        "QwQ-32B-Preview wrote on riddles and family puzzles, which comes with the package; default: no text, "
        "each weight is kept as it can be)",
    )


def _add_quality(parser: argparse.ArgumentParser) -> None:
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument(
        "--quality",
        metavar="FILE",
        nargs="?",
        const=True,
        help="compare source and conversion on this text, or on a bundled one: KL, agreement, report.html. Done for "
        "sources up to 2 GB; for the 32B it takes minutes on a Mac, and the plan (--dry-run) says about how many",
    )
    judged.add_argument("--no-quality", action="store_true", help="do not compare")
    parser.add_argument(
        "--quality-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of that text, context included (default: 2048)",
    )


class _Once(argparse.Action):
    """An option that a second value does not silently replace."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Store the value; a usage error where there is one."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option}: expected once, a conversion has one recipe and one output")
        setattr(namespace, self.dest, values)


def _convert(command: Command) -> int:
    from qwq_mlx.convert.job import convert_checkpoint
    from qwq_mlx.convert.plan_text import result_text
    from qwq_mlx.progress import ProgressBar

    options = command.options
    shown: list[str] = []
    with ProgressBar(unit="B", is_shown=not command.is_quiet) as bar:
        conversion = convert_checkpoint(
            options.source,
            options.output,
            recipe=options.recipe,
            scale_dtype=options.scale_dtype,
            target_bytes=None if options.target_bytes is None else _bytes(options.target_bytes),
            calibrate=options.calibrate,
            force=options.force,
            restart=options.restart,
            revision=options.revision,
            chat_template=options.chat_template,
            follow_links=options.follow_links,
            keep_source=options.keep_source,
            dry_run=options.dry_run,
            n_workers=options.n_workers,
            quality=False if options.no_quality else options.quality,
            quality_tokens=options.quality_tokens,
            on_plan=lambda plan: shown.extend(_show_plan(plan, command)),
            progress=lambda progress: _show_progress(progress, bar),
        )
    for warning in conversion.warnings:
        if warning not in shown:
            command.warn(f"warning: {warning}")
    if options.json:
        print(json.dumps({**asdict(conversion), "output": str(conversion.output)}))
    else:
        print(result_text(conversion))
    return 0


def _bytes(size: str) -> int:
    """ "17GB" -> 17000000000. Raises OptionError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", size)
    if match is None:
        raise OptionError(f"--target-size is {size!r}, expected a number and GB, GiB, MB or MiB: 17GB, 16.5GiB.")
    return int(float(match[1]) * {"GB": 10**9, "MB": 10**6, "GiB": 1 << 30, "MiB": 1 << 20}[match[2]])


def _show_plan(plan: Plan, command: Command) -> list[str]:
    """On stderr; of a dry run the plan is the result. Returns what was warned of, before hours are spent."""
    from qwq_mlx.convert.plan_text import plan_text
    from qwq_mlx.convert.source_warnings import source_warnings

    output = command.options.output
    parent = next(each for each in Path(output).absolute().parents if each.exists())
    text = command.with_flags(plan_text(plan, output, shutil.disk_usage(parent).free))
    if command.options.dry_run and not command.options.json:
        print(text)
    else:
        command.note(text)
    warnings = source_warnings(plan.checkpoint, chat_template=plan.chat_template)
    for warning in warnings:
        command.warn(f"warning: {warning}")
    return warnings


def _show_progress(progress: ConvertProgress, bar: ProgressBar) -> None:
    from qwq_mlx.convert.plan_text import size_text

    fetched = "" if progress.fetched_bytes is None else f"{size_text(progress.fetched_bytes)} fetched, "
    bar.show(
        _PHASES[progress.phase],
        progress.done_bytes,
        progress.total_bytes,
        n_before=progress.resumed_bytes,
        note=f"{fetched}{progress.what}",
    )


if __name__ == "__main__":
    sys.exit(main())
