"""Ctrl-C at a terminal: one asks what to do, two end at once. The terminal is a real one (a pty)."""

from __future__ import annotations

import functools
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PLAIN, start

from qwq_mlx.cli.signals import QUESTION, Interruption
from qwq_mlx.generate.reasoner import Reasoner, load

CTRL_C = b"\x03"
N_STARTS = 6
ASKED = QUESTION.strip()


@functools.cache
def loaded(model: Path) -> Reasoner:
    return load(model)


class Terminal:
    """The command with a terminal of its own: what is typed into it and what it shows."""

    def __init__(self, folder: Path, *given: str, model: Path) -> None:
        bans = [f"--logit-bias={i}=-inf" for i in loaded(model).model.stop_ids]
        self._leader, follower = pty.openpty()
        self.shown = b""
        self.process = start(
            "qwq_mlx.generate",
            *("-p", "x", "--model", str(model), "--temp", "0", "--on-loop", "off", *bans, *given),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=folder,
            environment=PLAIN,
            on_terminal=True,
        )
        os.close(follower)

    def type(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def wait_for(self, text: bytes, n: int = 1) -> None:
        assert self.shows(text, n), self.shown

    def shows(self, text: bytes, n: int = 1) -> bool:
        """Whether the text comes n times before the process ends (or a minute is over)."""
        deadline = time.monotonic() + 60
        while self.shown.count(text) < n and time.monotonic() < deadline:
            if select.select([self._leader], [], [], 0.2)[0]:
                if not (data := self._read()):
                    break
                self.shown += data
        return self.shown.count(text) >= n

    def end(self) -> int:
        """The exit code, once everything was read."""
        while data := self._read():
            self.shown += data
        return self.process.wait(timeout=60)

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)
        os.close(self._leader)

    def _read(self) -> bytes:
        try:
            return os.read(self._leader, 65_536)
        except OSError:  # Linux: the other side has closed
            return b""


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


def interrupted(terminals: list[Terminal], folder: Path, model: Path, *given: str) -> Terminal:
    """A run whose Ctrl-C was answered with the question.

    About one key in ten, on a busy machine, the terminal shows ^C and the kernel sends nobody a signal (a handler's
    wakeup descriptor stays empty): the run then ends as if nothing was typed, and another is started.
    """
    for _ in range(N_STARTS):
        terminal = Terminal(folder, *given, model=model)
        terminals.append(terminal)
        terminal.wait_for(b"greedy")
        terminal.type(CTRL_C)
        if terminal.shows(ASKED):
            return terminal
        for path in folder.iterdir():
            path.unlink()
    raise AssertionError(terminal.shown)


def test_answer_now_asks_for_the_answer_and_the_command_ends_well(
    terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint, "--answer-tokens", "5")
    terminal.type(b"a\n")
    assert terminal.end() == 0, terminal.shown
    assert b"**Final Answer**" in terminal.shown and b"answered: the answer was asked for" in terminal.shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_asks_again_and_stop_ends_the_run(
    terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint, "--save", "mine")
    terminal.type(b"x\n")
    terminal.wait_for(ASKED, 2)
    terminal.type(b"t\n")
    assert terminal.end() == 130, terminal.shown
    assert b"interrupted: interrupted" in terminal.shown
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_enter_goes_on_to_the_end(terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint)
    terminal.type(b"\n")
    assert terminal.end() == 0, terminal.shown
    assert b"context_full: " in terminal.shown
    (saved,) = tmp_path.iterdir()
    assert f"saved: go on with --resume {saved.name}".encode() in terminal.shown


def test_stop_leaves_nothing_behind(terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint)
    terminal.type(b"t\n")
    assert terminal.end() == 130, terminal.shown
    assert list(tmp_path.iterdir()) == []


def test_save_writes_a_run_that_goes_on_under_a_name_with_the_time(
    terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint)
    terminal.type(b"s\n")
    assert terminal.end() == 130, terminal.shown
    (saved,) = tmp_path.iterdir()
    assert f"saved: go on with --resume {saved.name}".encode() in terminal.shown
    assert re.fullmatch(r"qwq-run-\d{8}-\d{6}-\d+", saved.name)
    assert next(loaded(tiny_checkpoint).resume(saved)).index >= 0


def test_a_second_ctrl_c_ends_at_once(terminals: list[Terminal], tmp_path: Path, tiny_checkpoint: Path) -> None:
    terminal = interrupted(terminals, tmp_path, tiny_checkpoint, "--save", "mine")
    for _ in range(N_STARTS):  # a lost key leaves the question open
        terminal.type(CTRL_C)
        if terminal.ends_within(5):
            break
    assert terminal.end() == 130, terminal.shown
    assert b"interrupted: at once" in terminal.shown and b"Traceback" not in terminal.shown
    assert list(tmp_path.iterdir()) == []


class Stopped:
    """Stands for a run."""

    is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_without_a_terminal_the_first_signal_stops_and_the_second_interrupts(number: int, code: int) -> None:
    with Interruption(asks=False) as interruption:
        interruption.run = run = Stopped()
        signal.raise_signal(number)
        assert run.is_stopped and interruption.exit_code == code and interruption.wants_save is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_several_runs_at_once_are_stopped_without_a_question() -> None:
    with Interruption(asks=True) as interruption:
        interruption.run = run = Stopped()  # a batch: it has no answer_now
        signal.raise_signal(signal.SIGINT)
    assert run.is_stopped and interruption.exit_code == 130


def test_sigterm_asks_nothing_at_a_terminal_either() -> None:
    with Interruption(asks=True) as interruption:
        interruption.run = run = Stopped()
        signal.raise_signal(signal.SIGTERM)
    assert run.is_stopped and interruption.exit_code == 143


def test_a_signal_before_the_run_ends_at_once() -> None:
    with Interruption(asks=True), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
