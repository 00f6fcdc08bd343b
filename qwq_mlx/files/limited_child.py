"""Scripts run in child processes with limits of CPU, memory and wall time, for programs that come from strangers.

`run_limited` starts a child for one request. `LimitedForkServer` starts one for many: it has the script's imports ready
and answers each request in a fork, whose limits are its own and which leaves nothing behind for the next.

A child is started isolated (`python -I`), so that neither the current folder nor the environment is on its path; limits
are set before a request is read. On macOS the memory limit is advisory (not measured there); the CPU limit and the
parent's clock hold.

Does not: keep the script from reading files; each script imports nothing that would.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["LimitedForkServer", "run_limited"]

_IDLE_S = 60  # without a request a fork server ends


def run_limited(
    script: Path, request: Mapping[str, Any], *, cpu_s: int, memory_bytes: int, wall_s: float
) -> subprocess.CompletedProcess[bytes] | None:
    """Run a script with `request` on its stdin; its exit status, stdout and stderr, or None where wall_s went by.

    cpu_s: the child is ended by SIGXCPU then. memory_bytes: of address space; more fails in the child.
    """
    try:
        return subprocess.run(
            [sys.executable, "-I", __file__, str(script), str(cpu_s), str(memory_bytes)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=wall_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


class LimitedForkServer:
    """A child that answers any number of requests, each in a fork with limits of its own.

    The child starts with the first request and again after one that a limit ended; it ends with this process, or after
    60 s without a request.

    script: defines `answer(request)`, which returns bytes; its imports are made once, without limits.
    """

    def __init__(self, script: Path) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def ask(
        self, request: Mapping[str, Any], *, cpu_s: int, memory_bytes: int, wall_s: float
    ) -> subprocess.CompletedProcess[bytes] | None:
        """The script's answer as stdout, with exit status 0; else as `run_limited`, of this request alone.

        stderr: the exception with which the script failed, without its traceback.
        """
        line = f"{cpu_s} {memory_bytes} {json.dumps(request)}\n".encode()
        with self._lock:
            while True:
                done = self._asked(line, wall_s)
                if done is None or done.returncode != -signal.SIGALRM:  # it ended idle while the line was on its way
                    return done

    def close(self) -> None:
        """End the child; the next request starts another."""
        self._end()
        self._child = None

    def _asked(self, line: bytes, wall_s: float) -> subprocess.CompletedProcess[bytes] | None:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._start()
        child, is_late = self._child, threading.Event()
        assert child is not None

        def end_late() -> None:
            is_late.set()
            _kill(child)

        timer, is_whole = threading.Timer(wall_s, end_late), False
        timer.start()
        try:
            done = _exchange(child, line)
            is_whole = done is not None
            if done is None:  # a fork that fails ends the child, unless it says that it ended well
                _close_stdin(child)
                done = subprocess.CompletedProcess(child.args, child.wait() or 1, b"", b"")
        finally:  # also where a signal's handler raises
            timer.cancel()
            timer.join()
            if not is_whole or is_late.is_set():
                self.close()
        return None if is_late.is_set() else done

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it, and its forks are ended with it
        )
        self._end = weakref.finalize(self, _close, self._child)


def _exchange(child: subprocess.Popen[bytes], line: bytes) -> subprocess.CompletedProcess[bytes] | None:
    """The answer to a line, or its error with exit status 1; None where the child ended instead, or is to end."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(line)
        child.stdin.flush()
    except BrokenPipeError:
        return None
    code, _, n_bytes = child.stdout.readline().rstrip(b"\n").partition(b" ")
    if code not in (b"0", b"1") or not n_bytes.isdigit():
        return None
    data = child.stdout.read(int(n_bytes) + 1)
    if len(data) <= int(n_bytes):
        return None
    outcome = (0, data[:-1], b"") if code == b"0" else (1, b"", data[:-1])
    return subprocess.CompletedProcess(child.args, *outcome)


def _close_stdin(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it reads no more
        child.stdin.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and its fork."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended since (macOS says the latter)
            os.killpg(child.pid, signal.SIGKILL)


def _close(child: subprocess.Popen[bytes]) -> None:
    _kill(child)
    assert child.stdout is not None
    _close_stdin(child)
    child.stdout.close()
    child.wait()


def _limit(cpu_s: int, memory_bytes: int) -> None:
    import resource  # Windows has none; there no child is started

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        try:
            resource.setrlimit(kind, (memory_bytes, memory_bytes))
        except (OSError, ValueError):  # macOS refuses limits below what is mapped already
            continue


def _serve(answer: Callable[[Any], bytes]) -> None:
    """In the child: a fork for each line of stdin, which writes its answer; then a newline says that it ended well.

    A fork that writes none ends the child; a signal becomes the child's own.
    """
    signal.alarm(_IDLE_S)
    for line in sys.stdin.buffer:
        signal.alarm(0)
        fork = os.fork()
        if fork == 0:
            _answer(answer, line)
        code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        if code:
            return
        sys.stdout.buffer.write(b"\n")
        sys.stdout.flush()
        signal.alarm(_IDLE_S)


def _answer(answer: Callable[[Any], bytes], line: bytes) -> None:
    """In a fork, which ends here: its exit status, and the answer or the error, with their length."""
    cpu_s, memory_bytes, request = line.split(b" ", 2)
    _limit(int(cpu_s), int(memory_bytes))
    try:
        code, data = 0, answer(json.loads(request))
    except BaseException as error:  # noqa: BLE001 - the parent is told
        code, data = 1, "".join(traceback.format_exception_only(error)).encode(errors="backslashreplace")
    sys.stdout.buffer.write(b"%d %d\n" % (code, len(data)) + data)
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end takes longer than a template


def _main() -> None:
    """In the child: serve where no limits are named, else run the script once."""
    script, *limits = sys.argv[1:]
    if limits:
        _limit(*map(int, limits))
        runpy.run_path(script, run_name="__main__")
    else:
        _serve(runpy.run_path(script)["answer"])


if __name__ == "__main__":
    _main()
