"""The frame of the commands: where lines go, what an error costs, and fields that become flags."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.cli.command import Command, add_output, load_reasoner, make_parser, run_command
from qwq_mlx.cli.signals import Interruption
from qwq_mlx.errors import ConversionError, DiskFullError, OptionError, QwqError
from qwq_mlx.options import Limits


def parser() -> argparse.ArgumentParser:
    made = make_parser("thing", description="Does it.", exit_codes="0 done, 1 failed")
    add_output(made, json="one line")
    made.add_argument("--workers", type=int, dest="n_workers")
    made.add_argument("--force", action="store_true")
    made.add_argument("--quality")
    made.set_defaults(
        model=None,
        no_verify=False,
        chat_template=None,
        follow_links=False,
        draft=None,
        draft_length=None,
        hosts_split=None,
    )
    made.add_argument("--no-quality", action="store_true")
    return made


def run(work: Callable[[Command], int], *arguments: str, **options: Any) -> int:
    return run_command(parser(), arguments, work, **options)


def raising(error: BaseException) -> Callable[[Command], int]:
    def work(command: Command) -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OptionError("n_workers is 0, expected more."), 2, "error: --workers is 0, expected more.\n"),
        (ConversionError("out: pass `force=True`."), 1, "error: out: pass --force.\n"),
        (ConversionError("n_workers is said first, but of no option."), 1, "error: n_workers is said"),
        (DiskFullError("full"), 3, "error: full\n"),
        (MemoryError("Unable to allocate 8 EiB"), 5, "error: memory ran out (Unable to allocate 8 EiB). End what"),
        (
            QwqError("or with `quality=False`, or a `quality` of `other`"),
            1,
            "with --no-quality, or a --quality of `oth",
        ),
        (KeyboardInterrupt(), 130, "interrupted: nothing was changed.\n"),
    ],
)
def test_an_error_is_one_line_on_stderr_with_its_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == "" and line in err and err.count("\n") == 1


def test_a_command_may_have_one_code_for_every_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(DiskFullError("full")), failure_code=2) == 2


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="a defect"):
        run(raising(AssertionError("a defect")))


def test_quiet_leaves_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    def work(command: Command) -> int:
        sys.stdout.write("result\n")
        command.note("note")
        command.warn("warning")
        assert not command.shows_progress
        return 7

    assert run(work) == 7
    assert capsys.readouterr() == ("result\n", "note\nwarning\n")
    assert run(work, "--quiet") == 7
    assert capsys.readouterr() == ("result\n", "warning\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_work_with_its_code_and_a_line(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def work(command: Command) -> int:
        os.kill(os.getpid(), number)
        return 0

    assert run(work, "--force", interrupted=lambda options: f"stopped, {options.force}") == code
    assert capsys.readouterr().err == "stopped, True\n"
    assert signal.getsignal(number) is before


def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    silenced: list[int] = []
    monkeypatch.setattr("qwq_mlx.cli.command.silence", silenced.append)
    assert run(raising(BrokenPipeError())) == 0
    assert len(silenced) == 1 and capfd.readouterr() == ("", "")


def test_a_field_without_a_flag_stays_as_it_is() -> None:
    made = parser()
    command = Command(made, made.parse_args([]), Interruption(asks=False))
    assert command.with_flags("`n_workers`, `depth` and `depth=True`") == "--workers, `depth` and `depth=True`"


@pytest.mark.parametrize(("backend", "is_told"), [("cuda", True), ("metal", False), ("cpu", False)])
def test_on_cuda_the_wait_for_kernels_is_told(
    backend: str, is_told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = SimpleNamespace(chat_template=None)
    model = SimpleNamespace(warnings=(), tokenizer=tokenizer, has_manifest=False)
    loaded = SimpleNamespace(model=model, drafts=None)
    monkeypatch.setattr("qwq_mlx.generate.reasoner.load", lambda *_, **__: loaded)
    monkeypatch.setattr("qwq_mlx.model.device.backend_name", lambda: backend)
    monkeypatch.setattr("qwq_mlx.default_model.ready_model", lambda *_: tmp_path)

    def work(command: Command) -> int:
        load_reasoner(command, Limits(), warns_of_template=False)
        return 0

    assert run(work) == 0
    assert ("compiles kernels" in capsys.readouterr().err) == is_told
