"""The terminal is closed (SIGHUP), or whoever read our output leaves: the run is saved, and the exit code says it."""

from __future__ import annotations

import functools
import os
import pty
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from commands import PLAIN, Process, piped, start

from qwq_mlx.cli.signals import Interruption
from qwq_mlx.generate.reasoner import Reasoner, load

MODULE = "qwq_mlx.generate"


class Stopped:
    """Stands for a run."""

    n_stops = 0

    def stop(self) -> None:
        self.n_stops += 1


@functools.cache
def loaded(model: Path) -> Reasoner:
    return load(model)


def endless(model: Path, *given: str) -> list[str]:
    """Arguments of a run that only the context ends."""
    bans = [f"--logit-bias={i}=-inf" for i in loaded(model).model.stop_ids]
    return ["-p", "x", "--model", str(model), "--temp", "0", "--on-loop", "off", *bans, *given]


@contextmanager
def running(folder: Path, model: Path, *given: str) -> Iterator[tuple[Process, IO[bytes], IO[bytes]]]:
    """The command in a folder, with stdout and stderr, once its first byte of text has come."""
    with piped(MODULE, *endless(model, *given), cwd=folder) as (process, stdout, stderr):
        stdout.read(1)
        yield process, stdout, stderr


def test_a_hangup_stops_the_run_once_and_another_signal_then_ends_at_once() -> None:
    with Interruption(asks=False) as interruption:
        interruption.run = run = Stopped()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the shell and the kernel both send it
        assert (run.n_stops, interruption.exit_code) == (1, 129)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_what_was_shown_goes_nowhere_after_a_hangup_and_no_file_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Interruption(asks=False) as interruption:
            interruption.run = Stopped()
            before = sorted(Path("/dev/fd").iterdir())
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert sorted(Path("/dev/fd").iterdir()) == before
        assert os.fstat(follower).st_rdev == Path(os.devnull).stat().st_rdev


def test_a_command_that_is_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(asks=False) as interruption:
            interruption.run = run = Stopped()
            signal.raise_signal(signal.SIGHUP)
        assert (run.n_stops, interruption.exit_code) == (0, 0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_saves_the_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    leader, follower = pty.openpty()
    process = start(
        MODULE,
        *endless(tiny_checkpoint, "--save", "mine"),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=tmp_path,
        environment=PLAIN,
        on_terminal=True,
    )
    try:
        os.close(follower)
        shown = b""
        while b"greedy" not in shown:  # the run begins
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 65_536)
        os.read(leader, 1)
    finally:
        os.close(leader)
    assert process.wait(timeout=60) == 129
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    reasoner = loaded(tiny_checkpoint)
    run = reasoner.resume(tmp_path / "mine")
    n_saved = len(run.trace().ids)
    assert n_saved > 0 and len(run.trace().ids) + len(list(run)) > n_saved


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_a_run_that_goes_on(number: signal.Signals, tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "mine"
    with running(tmp_path, tiny_checkpoint, "--save", str(path)) as (process, stdout, stderr):
        process.send_signal(number)
        stdout.read()
        assert b"Traceback" not in stderr.read()
        assert process.wait(timeout=60) == 128 + number
    assert next(loaded(tiny_checkpoint).resume(path)).index > 0


@pytest.mark.parametrize(
    ("number", "flags"),
    [(signal.SIGHUP, ()), (signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("--no-save",))],
)
def test_without_save_a_run_cut_short_is_kept_unless_no_save_is_given(
    number: signal.Signals, flags: tuple[str, ...], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Nobody could be asked, and hours may be in it."""
    with running(tmp_path, tiny_checkpoint, *flags) as (process, stdout, stderr):
        process.send_signal(number)
        stdout.read()
        shown = stderr.read().decode()
        assert process.wait(timeout=60) == 128 + number
    kept = list(tmp_path.iterdir())
    assert len(kept) == (0 if flags else 1)
    for path in kept:
        assert f"saved: go on with --resume {path.name}\n" in shown
        assert next(loaded(tiny_checkpoint).resume(path)).index > 0


def test_a_signal_that_ends_the_reader_first_keeps_the_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Ctrl-C in `generate ... | tee` ends tee at once, and the run met a broken pipe on its way to the end."""
    with running(tmp_path, tiny_checkpoint) as (process, stdout, stderr):
        process.send_signal(signal.SIGSTOP)  # so that it meets both at once
        stdout.close()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        shown = stderr.read().decode()
        assert process.wait(timeout=60) == 130
    (path,) = tmp_path.iterdir()
    assert f"saved: go on with --resume {path.name}\n" in shown and "Traceback" not in shown
    assert next(loaded(tiny_checkpoint).resume(path)).index > 0


def test_a_reader_that_leaves_costs_nothing_that_was_to_be_saved(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "mine"
    with running(tmp_path, tiny_checkpoint, "--save", str(path)) as (process, stdout, stderr):
        stdout.close()
        shown = stderr.read()
        assert process.wait(timeout=60) == 0
    assert f"saved: go on with --resume {path}\n".encode() in shown and b"Traceback" not in shown
    assert next(loaded(tiny_checkpoint).resume(path)).index > 0
