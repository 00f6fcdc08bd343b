"""`generate --hosts localhost*2`: several processes hold the model together; this one starts, watches and ends them.

Each is the same command in a session of its own, with MLX's variables for its ring backend. Collectives have no
deadline: when a process dies, stops or hangs, the others wait for it or end without a name. So each writes a byte every
half second into a pipe, and who is silent is named here within seconds, and all are ended.

Does not: start processes on other machines, or talk to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, RankError

__all__ = ["Launch", "joined_group", "local_ranks", "without_flags"]

_RANK_PIPE = "QWQ_MLX_RANK_PIPE"  # names the open file into which a process of `Launch` writes that it is alive
_LOCAL = ("localhost", "127.0.0.1")
_BEAT_S = 0.5
_START_S = 30.0  # until a process says something first: it imports, beside all others
_SILENT_S = 9.0  # a busy machine lets a process wait for seconds
_LAST_S = 10.0  # for the other processes to end behind the first that is done
_MOST = 64


def local_ranks(hosts: str) -> int:
    """The number of processes that --hosts asks for on this machine.

    Raises OptionError for anything but localhost, a host twice, or a number below 2.

    >>> local_ranks("localhost*2"), local_ranks("localhost*1,127.0.0.1*1")
    (2, 2)
    """
    names, total = set(), 0
    for each in hosts.split(","):
        name, star, number = each.strip().partition("*")
        if name not in _LOCAL:
            raise OptionError(
                f"`hosts` names {name!r}, but processes are started on this machine alone so far (localhost*2). On "
                "other machines start a program of your own with mlx.launch (docs/machines.md)."
            )
        if name in names:
            raise OptionError(f"`hosts` names {name} twice. Write {name}*2 for two processes there.")
        if star and number not in map(str, range(1, _MOST + 1)):
            raise OptionError(f"`hosts` has {each.strip()!r}, expected a number from 1 to {_MOST} behind the star.")
        names.add(name)
        total += int(number) if star else 1
    if not 2 <= total <= _MOST:
        raise OptionError(f"`hosts` asks for {total} process{'es' * (total != 1)}, expected 2 to {_MOST}: localhost*2.")
    return total


def without_flags(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command's arguments without some flags that take a value.

    >>> without_flags(["--hosts", "localhost*2", "--temp", "0", "--model=m"], {"--hosts", "--model"})
    ['--temp', '0']
    """
    rest, is_value = [], False
    for each in arguments:
        if is_value or each in flags:
            is_value = not is_value
        elif each.partition("=")[0] not in flags:
            rest.append(each)
    return rest


def joined_group() -> Any | None:
    """The group of processes that this one was started in by `Launch`; None where it was not.

    Begins to say that this process is alive.
    """
    pipe = os.environ.get(_RANK_PIPE)
    if pipe is None:
        return None
    import mlx.core as mx

    threading.Thread(target=_beat, args=(int(pipe),), daemon=True, name="alive").start()
    return mx.distributed.init(strict=True, backend="ring")


def _beat(pipe: int) -> None:
    try:
        while True:
            os.write(pipe, b".")
            time.sleep(_BEAT_S)
    except OSError:  # whoever started and watched this process is gone, so nobody would end it
        os.kill(os.getpid(), signal.SIGKILL)


class Launch:
    """Runs one command as several processes; `work` returns the exit code of the first.

    arguments: of `python -m qwq_mlx.generate`, without --hosts. text: what each reads from stdin. silent_s: seconds
    without a sign of life after which a process has failed.
    """

    def __init__(self, arguments: Sequence[str], n_ranks: int, *, text: str, silent_s: float = _SILENT_S) -> None:
        self._silent_s = silent_s
        self._arguments, self._n_ranks, self._text = list(arguments), n_ranks, text
        self._processes: list[subprocess.Popen[bytes]] = []
        self._until: list[float] = []  # when each has failed if it says nothing before
        self._is_stopped = False

    def stop(self) -> None:
        """Ask the first process to end after the token under way; it agrees with the others."""
        self._is_stopped = True
        if self._processes:
            self._processes[0].send_signal(signal.SIGINT)

    def work(self) -> int:
        """Start all, wait for the first, and end what is left. Raises RankError naming the process that failed."""
        with tempfile.TemporaryDirectory(prefix="qwq-mlx-ranks-") as folder, selectors.DefaultSelector() as pipes:
            try:
                self._start(Path(folder), pipes)
                return self._watch(Path(folder), pipes)
            finally:
                self._end()
                for key in list(pipes.get_map().values()):
                    os.close(key.fd)

    def _start(self, folder: Path, pipes: selectors.BaseSelector) -> None:
        hostfile = folder / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(self._n_ranks)]))
        text = folder / "stdin"
        text.write_text(self._text, encoding="utf-8")
        for rank in range(self._n_ranks):
            heard, said = os.pipe()
            environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile), _RANK_PIPE: str(said)}
            with text.open("rb") as stdin, (folder / f"stderr-{rank}").open("wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-m", "qwq_mlx.generate", *self._arguments],
                    stdin=stdin,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=None if rank == 0 else stderr,
                    env=environment,
                    pass_fds=[said],
                    start_new_session=True,  # Ctrl-C comes to this process alone, which asks the first to stop
                )
            os.close(said)
            self._processes.append(process)
            self._until.append(time.monotonic() + max(_START_S, self._silent_s))
            pipes.register(heard, selectors.EVENT_READ, rank)

    def _watch(self, folder: Path, pipes: selectors.BaseSelector) -> int:
        while True:
            for key, _ in pipes.select(timeout=_BEAT_S):
                if os.read(key.fd, 4096):
                    self._until[key.data] = time.monotonic() + self._silent_s
                else:
                    pipes.unregister(key.fd)
                    os.close(key.fd)
            codes = [process.poll() for process in self._processes]
            if self._is_stopped and codes[0] == -signal.SIGINT:  # stopped before it could say so
                return 128 + signal.SIGINT
            for rank, code in enumerate(codes):
                if code is not None and code < 0:  # before the first one's own error, which is that it lost this one
                    raise self._failed(folder, rank, _ended(code))
            if codes[0] is not None:
                return codes[0] or self._last(folder)
            for rank, code in enumerate(codes):
                if code:
                    raise self._failed(folder, rank, _ended(code))
                if code is None and time.monotonic() > self._until[rank]:
                    stopped = self._stopped()
                    silent = rank if stopped is None else stopped
                    raise self._failed(folder, silent, "gave no sign of life in time (stopped, or it hangs)")

    def _stopped(self) -> int | None:
        """The first process that the system holds stopped; others that wait for it may be silent, too."""
        for rank, process in enumerate(self._processes):
            command = ["ps", "-o", "state=", "-p", str(process.pid)]
            try:
                state = subprocess.run(command, check=False, capture_output=True, text=True).stdout
            except OSError:  # a small system has no ps; then the first that is silent is named
                return None
            if state.strip().startswith("T"):
                return rank
        return None

    def _last(self, folder: Path) -> int:
        """The first is done: the others end by themselves."""
        until = time.monotonic() + _LAST_S
        for rank, process in enumerate(self._processes):
            try:
                code = process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise self._failed(folder, rank, f"did not end within {_LAST_S:.0f} s behind the first") from error
            if code:
                raise self._failed(folder, rank, _ended(code))
        return 0

    def _failed(self, folder: Path, rank: int, what: str) -> RankError:
        path = folder / f"stderr-{rank}"
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
        said = f" It said: {lines[-1][:300]}" if lines else ""
        who = f"process {rank} of {self._n_ranks} (localhost, pid {self._processes[rank].pid})"
        return RankError(f"{who} {what}; all were ended.{said}")

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ended(code: int) -> str:
    return f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def _free_ports(n: int) -> Iterator[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield from [each.getsockname()[1] for each in sockets]
