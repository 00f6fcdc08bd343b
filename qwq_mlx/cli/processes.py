"""Other processes: in which words they ended, which are stopped, and how to end those of another machine and to stop
and go on with all by Ctrl-Z.

Does not: know whose processes they are (`launch` does).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from qwq_mlx.cli.hosts import ssh_command

__all__ = ["LOST", "describe_exit", "kill_remote", "pausable", "stopped_pids"]

LOST = 255
"""What ssh exits with where the connection broke, or its process was ended by a signal."""


@contextmanager
def pausable(pause: Callable[[], None], go_on: Callable[[], None]) -> Iterator[None]:
    """Within it a Ctrl-Z calls `pause` before this process is stopped, and `go_on` once it goes on.

    Outside the main thread, where no signal can be handled, and where Ctrl-Z is ignored, it changes nothing.
    """
    is_ignored = signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        pause()
        os.kill(os.getpid(), signal.SIGSTOP)
        go_on()

    before = signal.signal(signal.SIGTSTP, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def stopped_pids(pids: Collection[int]) -> list[int]:
    """Those of some processes that the system holds stopped (SIGSTOP); none where it has no ps."""
    command = ["ps", "-o", "pid=,state=", "-p", ",".join(map(str, pids))]
    try:
        lines = subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []
    return [int(pid) for pid, state in map(str.split, lines) if state.startswith("T")]


def kill_remote(ssh: str, pid: int) -> subprocess.Popen[bytes]:
    """End a process of another machine, which an end of ssh alone does not where it is stopped."""
    script = f"ps -p {pid} -o args= | grep -q qwq_mlx && kill -KILL {pid}"
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen([*ssh_command(), ssh, script], start_new_session=True, **quiet)


def describe_exit(code: int, *, is_remote: bool) -> str:
    """How a process ended. is_remote: it is ssh's, that has another machine's exit code."""
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    if is_remote and code == LOST:
        return "was ended by a signal, or the connection to its machine broke"
    return f"ended with exit code {code}"
