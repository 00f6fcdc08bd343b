"""Stopped processes: which are, and Ctrl-Z of a command whose work other processes do, which are stopped with it.

Does not: know whose processes they are (`launch` does).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

__all__ = ["pausable", "stopped_pids"]


@contextmanager
def pausable(pause: Callable[[], None], go_on: Callable[[], None]) -> Iterator[None]:
    """Within it a Ctrl-Z calls `pause` before this process is stopped, and `go_on` once it goes on.

    Outside the main thread, where no signal can be handled, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
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
