"""`python -m qwq_mlx.tune_draft --draft DIR --traces FILE... --output DIR`: a drafter learns from what a model wrote.

The result goes to stdout, as text or with --json as one line; plan and progress go to stderr.

Does not: train anything itself (`qwq_mlx.tune_draft.job` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwq_mlx.cli.command import Command, add_output, how_to_go_on, make_parser, run_command
from qwq_mlx.errors import OptionError
from qwq_mlx.tune_draft.settings import TuneSettings

if TYPE_CHECKING:
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.tune_draft.job import Progress

_SETTINGS = ("all_weights", "rank", "learning_rate", "epochs", "batch_tokens", "max_length", "held_out_share", "seed")


class _Stop:
    """What a signal stops: measuring and training, behind the batch under way."""

    def __init__(self) -> None:
        self.is_set = False

    def stop(self) -> None:
        """End behind the batch under way."""
        self.is_set = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _tune, interrupted=how_to_go_on)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "tune_draft",
        description="Train a draft model on what a model wrote, so that --draft names more of its tokens. "
        "Tokens a pass on held-out problems are printed, before and after; a drafter that got no better is not kept. "
        "An interrupted tuning goes on where it was when the same command runs again.",
        exit_codes="0 done, 1 failed or not better, 2 wrong usage, 3 disk full, 4 the loss is not a number, 5 out of "
        "memory, 129 terminal closed, 130 interrupted (Ctrl-C), 143 terminated",
    )
    add = parser.add_argument
    add("--draft", metavar="DIR", required=True, help="draft model: a Qwen2 checkpoint or a conversion of one")
    add(
        "--traces",
        metavar="FILE",
        nargs="+",
        required=True,
        help="what the model wrote: results of generate --input, saved traces, a server's history, or JSON lines with "
        "prompt and response",
    )
    add("--output", metavar="DIR", required=True, help="folder of the tuned drafter, floats in bfloat16")
    add(
        "--held-out",
        metavar="FILE",
        nargs="+",
        help="traces to measure on, whose problems are not trained on (default: a part of the problems of --traces)",
    )
    _add_settings(add)
    add("--keep", action="store_true", help="keep the tuned drafter even if it got no better")
    add("--restart", action="store_true", help="discard an unfinished tuning instead of continuing it")
    add_output(parser, json="print the result as one line of JSON")
    return parser


def _add_settings(add: Callable[..., object]) -> None:
    """The fields of `TuneSettings`."""
    default = TuneSettings()
    add(
        "--held-out-share",
        type=float,
        metavar="SHARE",
        help=f"of the problems of --traces that are measured on instead (default: {default.held_out_share})",
    )
    add("--all-weights", action="store_true", help="train every weight, with 22 bytes of memory each on a GPU")
    add("--rank", type=int, metavar="N", help=f"rank of the LoRA layers (default: {default.rank})")
    add(
        "--learning-rate",
        type=float,
        metavar="R",
        help="highest learning rate (default: 2e-4, with --all-weights 2e-5)",
    )
    add("--epochs", type=int, metavar="N", default=default.epochs, help="times that all is read (default: %(default)s)")
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        default=default.batch_tokens,
        help="tokens in a step, prompts included; decides the memory (default: %(default)s)",
    )
    add(
        "--max-length",
        type=int,
        metavar="N",
        default=default.max_length,
        help="tokens that are read at once; longer traces are cut, with overlap (default: %(default)s)",
    )
    add("--seed", type=int, metavar="N", default=default.seed, help="of all that is random (default: %(default)s)")


def _tune(command: Command) -> int:
    settings = _settings(command.options)
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.tune_draft.job import NotBetterError, Stopped, Tuning, tune_draft

    options, stop = command.options, _Stop()
    tuning = Tuning(
        draft=Path(options.draft),
        traces=[Path(path) for path in options.traces],
        output=Path(options.output),
        held_out=None if options.held_out is None else [Path(path) for path in options.held_out],
        keep=options.keep,
        restart=options.restart,
    )
    command.interruption.run = stop
    with ProgressBar(unit=" tokens", is_shown=not command.is_quiet) as bar:
        try:
            result = tune_draft(
                tuning,
                settings,
                progress=lambda progress: _show_progress(progress, bar),
                note=command.note,
                is_stopped=lambda: stop.is_set,
            )
        except NotBetterError as error:
            bar.clear()
            _show(error.result, is_json=options.json, is_kept=False)
            raise
        except Stopped:
            bar.clear()
            command.warn(how_to_go_on(options))
            return command.interruption.exit_code
    _show(result, is_json=options.json, is_kept=True)
    return 0


def _settings(options: argparse.Namespace) -> TuneSettings:
    """Raises OptionError for a value that cannot be honoured, or would not be used."""
    if options.all_weights and options.rank is not None:
        raise OptionError(f"rank is {options.rank}, but with `all_weights` there are no LoRA layers. Leave one out.")
    if options.held_out is not None and options.held_out_share is not None:
        raise OptionError(
            f"held_out_share is {options.held_out_share}, but `held_out` says what is measured on. Leave one out."
        )
    asked = {name: getattr(options, name) for name in _SETTINGS}
    return TuneSettings(**{name: value for name, value in asked.items() if value is not None})


def _show_progress(progress: Progress, bar: ProgressBar) -> None:
    bar.show(progress.what, progress.n_done, progress.n_total, n_before=progress.n_before, note=progress.note)


def _show(result: dict[str, Any], *, is_json: bool, is_kept: bool) -> None:
    if is_json:
        print(json.dumps({**result, "is_kept": is_kept}))
        return
    before, after = result["before"], result["after"]
    print(f"on {after['tokens']:,} held-out tokens{'':<10}{'named':>8}  tokens a pass at")
    print(f"{'':<36}{'':<6}" + "".join(f"{length:>6}" for length in after["by_length"]) + " drafts")
    for name, each in (("before", before), ("after", after)):
        figures = "".join(f"{value:>6.2f}" for value in each["by_length"].values())
        print(f"{name:<34}{100 * each['named']:>6.1f} %{figures}")
    if is_kept:
        print(f"{result['output']}: the tuned drafter, for --draft")


if __name__ == "__main__":
    sys.exit(main())
