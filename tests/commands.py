"""How tests start a command in a process of its own: with this checkout, and without PyTorch where it is installed.

Users have no PyTorch, and nothing but the tests' oracles needs it; transformers imports it where it finds it, which
takes 1.8 of the 4.3 CPU seconds of a short `python -m qwq_mlx.generate`. Most of the rest is importing, too, so a
process that has imported everything is started once and forks (`command_server.py`), except on macOS, where Metal does
not outlive a fork.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

_TESTS = Path(__file__).resolve().parent

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS / "without_torch")])}
PLAIN = {**ENVIRONMENT, "NO_COLOR": "1"}
# The command, with stdin made the terminal that controls it: closing it sends SIGHUP, and its keys send signals.
_ON_TERMINAL = (
    "import fcntl, runpy, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
)


_STARTED: list[subprocess.Popen[bytes]] = []


class Process(Protocol):
    """A command under way."""

    pid: int

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired."""


def start(
    module: str,
    *arguments: str,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
    on_terminal: bool = False,
) -> Process:
    """`python -W error -m MODULE ARGUMENTS` in a process of its own.

    stdin, stdout, stderr: descriptors; None is /dev/null. on_terminal: stdin is the terminal that controls the process.
    """
    null = os.open(os.devnull, os.O_RDWR)
    streams = [null if each is None else each for each in (stdin, stdout, stderr)]
    try:
        if sys.platform == "darwin":
            how = ["-c", _ON_TERMINAL, module] if on_terminal else ["-m", module]
            return subprocess.Popen(
                [sys.executable, "-W", "error", *how, *arguments],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                cwd=cwd,
                env=dict(environment),
                start_new_session=on_terminal,
            )
        request = {"module": module, "arguments": arguments, "cwd": str(cwd or Path.cwd())}
        return _Forked({**request, "environment": dict(environment), "on_terminal": on_terminal}, streams)
    finally:
        os.close(null)


def run(
    module: str,
    *arguments: str,
    stdin: bytes = b"",
    stdout: int | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> subprocess.CompletedProcess[bytes]:
    """Start a command and wait for its end. stdout: a descriptor; None hands back what was written there."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        streams = {"stdin": given.fileno(), "stdout": stdout or out.fileno(), "stderr": err.fileno()}
        code = start(module, *arguments, cwd=cwd, environment=environment, **streams).wait(120)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([module, *arguments], code, out.read(), err.read())


@contextmanager
def piped(module: str, *arguments: str, cwd: Path | None = None) -> Iterator[tuple[Process, IO[bytes], IO[bytes]]]:
    """A command under way with what it writes: process, stdout, stderr. It is killed where it is still there."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    try:
        process = start(module, *arguments, stdout=its_out, stderr=its_err, cwd=cwd, environment=PLAIN)
    finally:
        os.close(its_out)
        os.close(its_err)
    with os.fdopen(out, "rb") as stdout, os.fdopen(err, "rb") as stderr:
        try:
            yield process, stdout, stderr
        finally:
            process.kill()
            process.wait()


class _Forked:
    """A command that the server of commands has forked into."""

    def __init__(self, request: dict[str, Any], streams: list[int]) -> None:
        self._status, status = os.pipe()
        data = json.dumps(request).encode() + b"\n"
        n_sent = socket.send_fds(_server(), [data], [*streams, status])
        _server().sendall(data[n_sent:])
        os.close(status)
        self.pid = int(self._read_until(b" ", 60))
        self._code: int | None = None

    def send_signal(self, number: int, /) -> None:
        with suppress(ProcessLookupError):  # it has ended; Popen says nothing either
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self._code is None:
            self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = int(self._read_until(b"", timeout))
            os.close(self._status)
        return self._code

    def _read_until(self, end: bytes, timeout: float | None) -> bytes:
        """What the server says of the command up to a byte, or up to its end."""
        said = b""
        while True:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a command of the server", timeout or 0)
            if (byte := os.read(self._status, 1)) == end:
                return said
            assert byte, "the server of commands has ended"
            said += byte


@functools.cache
def _server() -> socket.socket:
    """The way to the process that forks into commands; it ends when this one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        _STARTED.append(subprocess.Popen([sys.executable, _TESTS / "command_server.py"], stdin=theirs, env=ENVIRONMENT))
    return ours
