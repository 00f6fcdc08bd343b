"""Processes that hold a model together over MLX's ring on this machine: the ids of one process, and failures."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.cli.hosts import Launch, local_ranks, without_flags
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import OptionError, RankError
from qwq_mlx.generate.__main__ import main

QUESTION = "What is 3 + 4?"
POCKET = pocket_checkpoint()


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("a.local,b.local", "on this machine alone so far"),
        ("localhost,localhost", "twice"),
        ("localhost", "asks for 1 process, expected 2 to 64"),
        ("localhost*0", "expected a number from 1 to 64"),
        ("localhost*" + "9" * 5000, "expected a number from 1 to 64"),
        ("localhost*two", "expected a number from 1 to 64"),
        ("localhost*60,127.0.0.1*5", "asks for 65 processes"),
    ],
)
def test_hosts_that_cannot_be_are_named(hosts: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        local_ranks(hosts)


def test_the_processes_get_the_other_arguments() -> None:
    given = ["-p", "--hosts", "--temp", "0", "--hosts=localhost*2", "--prompt", "x", "--json"]
    assert without_flags(given, {"--hosts", "-p", "--prompt"}) == ["--temp", "0", "--json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "localhost*3"], "4 attention heads are no multiple of 3. Possible: 2."),
        (["--hosts", "localhost*2", "--save", "x"], "--hosts and --save do not go together yet"),
        (["--hosts", "localhost*2", "--draft", "ngram"], "--hosts and --draft do not go together yet"),
    ],
)
def test_what_cannot_be_held_together_is_refused_before_a_process_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--model", str(POCKET), "-p", "hi", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused_before_a_process_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(POCKET), "--hosts", "localhost*2", "-p", "\udcff"]) == 1
    assert "Give the prompt as UTF-8" in capsys.readouterr().err


def _launch(*arguments: str) -> Launch:
    return Launch(
        ["--model", str(POCKET), "--temp", "0", "--prompt", "-", "--no-save", *arguments],
        2,
        text=QUESTION,
        silent_s=100,
    )


def _after_it_writes(launch: Launch, do: Callable[[Launch], None], output: Path) -> threading.Thread:
    """Do something as soon as there is output."""

    def wait() -> None:
        until = time.monotonic() + 100
        while time.monotonic() < until and output.stat().st_size < 8:
            time.sleep(0.02)
        do(launch)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def _with_stdout(path: Path, work: Callable[[], int]) -> int:
    """Call with this process's stdout, which the first process inherits, in a file."""
    before = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            return work()
        finally:
            os.dup2(before, 1)
            os.close(before)


def test_four_processes_write_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, together = tmp_path / "model", tmp_path / "together"
    write_tiny_checkpoint(model, hidden_size=256, intermediate_size=512, n_heads=8, n_kv_heads=4)
    arguments = ["--model", str(model), "--temp", "0.8", "--seed", "3", "--max-tokens", "16", "-p", QUESTION]
    launch = Launch([*arguments, "--no-save"], 4, text="", silent_s=100)  # the machine may be busy with other tests
    assert _with_stdout(together, launch.work) == 0
    assert main([*arguments, "--no-save"]) == 0
    assert together.read_text() == capsys.readouterr().out != ""


def test_a_process_that_is_killed_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()
    launch = _launch("--max-tokens", "3000", "--on-loop", "off")
    thread = _after_it_writes(launch, lambda each: os.kill(each._processes[1].pid, signal.SIGKILL), output)
    with pytest.raises(RankError, match=r"process 1 of 2 .* was ended by signal 9") as caught:
        _with_stdout(output, launch.work)
    thread.join()
    assert caught.value.exit_code == 6
    assert all(process.poll() is not None for process in launch._processes)


class _Ended:
    """A process as `Launch` sees it, that has ended."""

    def __init__(self, code: int) -> None:
        self.pid, self.code = 0, code

    def poll(self) -> int:
        return self.code


@pytest.mark.parametrize(
    ("codes", "named"), [((1, -9), r"process 1 of 2 .* was ended by signal 9"), ((-9, 1), "process 0 of 2")]
)
def test_the_killed_process_is_named_also_where_its_loss_ended_the_other(
    tmp_path: Path, codes: tuple[int, int], named: str
) -> None:
    launch = _launch()
    launch._processes = [_Ended(code) for code in codes]  # type: ignore[misc]
    with selectors.DefaultSelector() as pipes, pytest.raises(RankError, match=named):
        launch._watch(tmp_path, pipes)


def test_a_first_process_that_ctrl_c_ends_before_it_could_listen_was_interrupted(tmp_path: Path) -> None:
    launch = _launch()
    launch.stop()
    launch._processes = [_Ended(-signal.SIGINT), _Ended(-signal.SIGINT)]  # type: ignore[misc]
    with selectors.DefaultSelector() as pipes:
        assert launch._watch(tmp_path, pipes) == 130


def test_processes_end_with_the_one_that_started_them() -> None:
    """Nobody else would end them: they are in sessions of their own."""
    heard, said = os.pipe()
    code = "import os, time; from qwq_mlx.cli.hosts import _beat; _beat(int(os.environ['PIPE']))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PIPE": str(said)}, pass_fds=[said])
    os.close(said)
    assert os.read(heard, 1) == b"."
    os.close(heard)
    assert process.wait(timeout=20) == -signal.SIGKILL
