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
import tempfile
import threading
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

    The child starts with the first request and again after one that failed; it ends with this process, or after 60 s
    without a request.

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
        """The script's answer as stdout, with exit status 0; else as `run_limited`, of this request alone."""
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

        timer, done = threading.Timer(wall_s, end_late), None
        timer.start()
        try:
            done = _exchange(child, line)
            if done is None:  # a fork that failed ends the child; one that ended without an answer does not
                _close_stdin(child)
                code = child.wait() or 1
                self._stderr.seek(0)
                done = subprocess.CompletedProcess(child.args, code, b"", self._stderr.read())
        finally:  # also where a signal's handler raises
            timer.cancel()
            timer.join()
            if done is None or done.returncode != 0 or is_late.is_set():
                self.close()
        return None if is_late.is_set() else done

    def _start(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _end); a pipe that nobody reads would fill
        self._child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C is not for it, and its forks are ended with it
        )
        self._end = weakref.finalize(self, _close, self._child, self._stderr)


def _exchange(child: subprocess.Popen[bytes], line: bytes) -> subprocess.CompletedProcess[bytes] | None:
    """The answer to a line; None where the child ended instead."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(line)
        child.stdin.flush()
    except BrokenPipeError:
        return None
    n_bytes = child.stdout.readline()
    answer = child.stdout.read(int(n_bytes) + 1) if n_bytes[:-1].isdigit() else b""
    is_whole = n_bytes == b"%d\n" % (len(answer) - 1)
    return subprocess.CompletedProcess(child.args, 0, answer[:-1], b"") if is_whole else None


def _close_stdin(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it reads no more
        child.stdin.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and its fork."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended since (macOS says the latter)
            os.killpg(child.pid, signal.SIGKILL)


def _close(child: subprocess.Popen[bytes], stderr: Any) -> None:
    _kill(child)
    assert child.stdout is not None
    _close_stdin(child)
    child.stdout.close()
    child.wait()
    stderr.close()


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

    A fork that fails ends the child: an exception is told on stderr, and a signal becomes the child's own.
    """
    signal.alarm(_IDLE_S)
    for line in sys.stdin.buffer:
        signal.alarm(0)
        fork = os.fork()
        if fork == 0:
            cpu_s, memory_bytes, request = line.split(b" ", 2)
            _limit(int(cpu_s), int(memory_bytes))
            data = answer(json.loads(request))
            sys.stdout.buffer.write(b"%d\n" % len(data) + data)
            sys.stdout.flush()
            os._exit(0)  # the interpreter's own end takes longer than a template
        code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        if code:
            return
        sys.stdout.buffer.write(b"\n")
        sys.stdout.flush()
        signal.alarm(_IDLE_S)


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
