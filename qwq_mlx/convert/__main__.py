"""`python -m qwq_mlx.convert --source DIR --output DIR`: a checkpoint becomes packed MLX weights.

Arguments are read before anything heavy is imported, so --help answers at once. Plan, progress and result go to stderr;
stdout stays empty but for --json. An interrupted run says how to go on.

Does not: convert anything itself (`qwq_mlx.convert.job` does).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from qwq_mlx.errors import OptionError, QwqError
from qwq_mlx.quant import DEFAULT_RECIPE

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.progress import Progress
    from qwq_mlx.convert.result import Conversion


class _TerminatedError(BaseException):
    """SIGTERM came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    screen = _Screen(quiet=options.quiet)
    try:
        conversion = _convert(options, screen)
        if options.json:
            print(json.dumps({**asdict(conversion), "output": str(conversion.output)}))
    except QwqError as error:
        return screen.complain(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return screen.complain(_how_to_go_on(options), 130)
    except _TerminatedError:
        return screen.complain(_how_to_go_on(options), 143)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwq_mlx.convert",
        description="Convert a Qwen2 checkpoint (QwQ-32B-Preview) to packed MLX weights, in bounded memory. "
        "An interrupted conversion goes on where it was when the same command runs again.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 disk full, 130 interrupted (Ctrl-C), 143 terminated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--source",
        metavar="DIR",
        required=True,
        help="the checkpoint's folder, or a repository of the Hub (Qwen/QwQ-32B-Preview), fetched shard by shard",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of the repository (default: main)")
    add("--output", metavar="DIR", required=True, action=_Once, help="the folder to make")
    add(
        "--recipe",
        metavar="NAME",
        action=_Once,
        help=f"a recipe under conversions/, or the path of a .toml file (default: {DEFAULT_RECIPE})",
    )
    add(
        "--target-size",
        metavar="SIZE",
        help="choose the bits of every matrix so that the output fits this size, as 17GB (also GiB, MB, MiB): the "
        "recipe's mode, fit and overrides stay, groups are its own or larger; the output matrix, narrow matrices and "
        "the layers where rounding hurts most get more (default: the recipe's bits)",
    )
    add(
        "--calibrate",
        metavar="TEXT",
        help="a text, or .jsonl of {text} or {messages}, whose activations weigh the errors of the fit; the source is "
        "run on it first, one layer in memory (at least 512 tokens; from the Hub every shard is fetched twice, or once "
        "with --keep-source; default: no text)",
    )
    add("--force", action="store_true", help="replace an existing output, once the new one is complete")
    add("--restart", action="store_true", help="throw an unfinished conversion away instead of continuing it")
    add("--keep-source", action="store_true", help="leave what is fetched in OUTPUT.source")
    add("--dry-run", action="store_true", help="show the plan and stop")
    add("--workers", type=int, metavar="N", help="threads that pack (default: one per core)")
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
    add("--quality-tokens", type=int, metavar="N", help="tokens of that text at most, context included (default: 2048)")
    add("--json", action="store_true", help="print the result as one line of JSON on stdout")
    add("--quiet", action="store_true", help="on stderr only warnings and errors")
    return parser


class _Once(argparse.Action):
    """An option that a second value does not silently replace."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Store the value; a usage error where there is one."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option}: expected once, a conversion has one recipe and one output")
        setattr(namespace, self.dest, values)


def _convert(options: argparse.Namespace, screen: _Screen) -> Conversion:
    from qwq_mlx.convert.job import convert_checkpoint
    from qwq_mlx.convert.plan_text import result_text

    conversion = convert_checkpoint(
        options.source,
        options.output,
        recipe=DEFAULT_RECIPE if options.recipe is None else options.recipe,
        target_bytes=None if options.target_size is None else _bytes(options.target_size),
        calibrate=options.calibrate,
        force=options.force,
        restart=options.restart,
        revision=options.revision,
        keep_source=options.keep_source,
        dry_run=options.dry_run,
        n_workers=options.workers,
        quality=False if options.no_quality else options.quality,
        quality_tokens=options.quality_tokens,
        on_plan=lambda plan: screen.show_plan(plan, options.output),
        progress=None if options.quiet else screen.show_progress,
    )
    if options.quiet:
        for warning in conversion.warnings:
            screen.say(f"warning: {warning}")
    else:
        screen.say(result_text(conversion))
    return conversion


def _bytes(size: str) -> int:
    """ "17GB" -> 17000000000. Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", size)
    if found is None:
        raise OptionError(f"--target-size is {size!r}, expected a number and GB, GiB, MB or MiB: 17GB, 16.5GiB.")
    return int(float(found[1]) * {"GB": 10**9, "MB": 10**6, "GiB": 1 << 30, "MiB": 1 << 20}[found[2]])


class _Screen:
    """stderr: whole lines, and on a terminal one progress line that the next one replaces."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._is_open = False  # a progress line stands on the terminal, without its end
        self._progress: object = None

    def say(self, text: str) -> None:
        self._end_line()
        print(text, file=sys.stderr, flush=True)

    def complain(self, text: str, code: int) -> int:
        self.say(text)
        return code

    def show_plan(self, plan: Plan, output: str) -> None:
        from qwq_mlx.convert.plan_text import plan_text

        if not self._quiet:
            parent = next(each for each in Path(output).absolute().parents if each.exists())
            self.say(plan_text(plan, output, shutil.disk_usage(parent).free))

    def show_progress(self, progress: Progress) -> None:
        from qwq_mlx.convert.plan_text import ProgressLine

        if not isinstance(self._progress, ProgressLine):
            self._progress = ProgressLine(is_terminal=self._is_terminal)
        line = self._progress.update(progress)
        if line is None:
            return
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{line[:width]}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._is_open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._is_open = False


def _how_to_go_on(options: argparse.Namespace) -> str:
    output = Path(options.output).absolute()
    partial = output.with_name(f"{output.name}.partial")
    if not partial.exists():
        return "interrupted: nothing was kept."
    return (
        f"interrupted: what is finished is kept in {partial}. "
        "Run the same command again to go on from there, or add --restart to begin anew."
    )


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _TerminatedError


if __name__ == "__main__":
    sys.exit(main())
