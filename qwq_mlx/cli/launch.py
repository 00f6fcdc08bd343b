"""Starts the processes that hold a model together, watches them, and ends them all; rank 0 is the user's own command.

Rank 0 runs here, with this terminal, these files and this port, so every command works as in one process; the others
only follow it (`follow`). Each rank is in a session of its own, and signals that come here go on to rank 0.

Does not: decide where ranks run (`hosts` does), or what a failure looks like (`watch` does).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwq_mlx.cli.hosts import Hosts, ssh_command
from qwq_mlx.cli.processes import LOST, describe_exit, kill_remote, pausable, stopped_pids
from qwq_mlx.cli.rank import BEAT_S, PAUSED, RANK_VARIABLE, RankSetup
from qwq_mlx.cli.watch import SILENT_S, START_S, Watch
from qwq_mlx.errors import RankError

__all__ = ["Launch"]

_LAST_S = 8.0  # for the processes to end behind the first that did
_MANY_SIGNALS, _DEAF_S = 3, 2.0
_SETTLE_S = 2.0  # for a failure to show itself in every process that it ends
_LATE_S = 2.0  # where it took so long to look again, this process was stopped, or got no processor
# MLX's ring sometimes ends in one of these where the process at its other end is gone.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
_STOPPED = "is stopped"


class Launch:
    """Runs one command as several processes; `work` returns the exit code of rank 0.

    module: of the command, as qwq_mlx.generate. arguments: without --hosts. silent_s: as `Watch` takes it.
    warn: takes a line about a process that is slow. on_failure: called with a failure before the processes are ended,
      which takes seconds where one cannot be reached.
    snapshots: the file in which rank 0 keeps its run; it is there until `close`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        hosts: Hosts,
        *,
        silent_s: float = SILENT_S,
        warn: Callable[[str], object] = lambda line: None,
        on_failure: Callable[[RankError], object] = lambda error: None,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._hosts = hosts
        join_s = None if hosts.backend == "ring" else START_S
        self._watch = Watch([host.name for host in hosts.ranks], silent_s=silent_s, join_s=join_s)
        self._folder = tempfile.TemporaryDirectory(prefix="qwq-mlx-ranks-")
        self.snapshots = Path(self._folder.name) / "run.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._warn, self._on_failure = warn, on_failure
        self._unread: dict[int, bytes] = {}
        self._signals: list[int] = []

    def forward(self, number: int) -> None:
        """Hand a signal on to rank 0. Safe to call from a signal handler."""
        self._signals.append(number)
        sign = self._watch.sign(0)
        is_deaf = not sign.get("silent_s") or sign.get("waiting_s", 0.0) > _DEAF_S
        if len(self._signals) >= _MANY_SIGNALS and is_deaf:
            raise KeyboardInterrupt  # it waits inside MLX, where no signal reaches it
        if self.processes:
            self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.processes[0].send_signal(number)

    def stop(self) -> None:
        """Ask rank 0 to end after the token under way."""
        self.forward(signal.SIGINT)

    def sign(self, rank: int) -> Mapping[str, Any]:
        """The last sign of life of a process, as `cli.rank` writes it."""
        return self._watch.sign(rank)

    def close(self) -> None:
        """Forget what was kept of the run."""
        self._folder.cleanup()

    def work(self) -> int:
        """Start all, wait for rank 0, and end what is left. Raises RankError naming the process that failed."""
        with selectors.DefaultSelector() as pipes, pausable(self._pause, self._go_on):
            try:
                self._start(pipes)
                return self._wait(pipes)
            except RankError as error:
                self._on_failure(error)
                raise
            finally:
                self._end()
                for key in list(pipes.get_map().values()):
                    os.close(key.fd)

    def _start(self, pipes: selectors.BaseSelector) -> None:
        for rank in range(len(self._hosts.ranks)):
            heard, said = os.pipe()
            try:
                self.processes.append(self._leader(said) if rank == 0 else self._follower(rank, said))
            finally:
                os.close(said)
            pipes.register(heard, selectors.EVENT_READ, rank)
            if rank == 0 and self._signals:  # it came before rank 0 was there
                self._send(self._signals[0])

    def _setup(self, rank: int, signs: int = 1) -> RankSetup:
        return self._hosts.setup(rank, signs=signs, snapshots=str(self.snapshots) if rank == 0 else "")

    def _leader(self, said: int) -> subprocess.Popen[bytes]:
        setup = self._setup(0, signs=said)
        environment = {**os.environ, **setup.environment, RANK_VARIABLE: setup.to_json()}
        return subprocess.Popen(self._command, env=environment, pass_fds=[said], start_new_session=True)

    def _follower(self, rank: int, said: int) -> subprocess.Popen[bytes]:
        host, setup = self._hosts.ranks[rank], self._setup(rank)
        command = [host.python or sys.executable, "-m", "qwq_mlx.cli.follow"]
        if host.ssh is not None:
            command = [*ssh_command(), host.ssh, f"exec {shlex.join(command)}"]
        with self._errors(rank).open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, **setup.environment},
            )
        assert process.stdin is not None, "it was asked for"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(setup.to_json().encode() + b"\n")
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _wait(self, pipes: selectors.BaseSelector) -> int:
        told, looked = 0.0, time.monotonic()
        while True:
            for key, _ in pipes.select(timeout=BEAT_S / 2):
                self._hear(pipes, key)
            now = time.monotonic()
            if now - looked > _LATE_S:
                self._watch.forgive()
            looked = now
            if now - told > BEAT_S:
                self._tell_followers(b"\n")
                told = now
            if any(process.poll() is not None for process in self.processes):
                return self._settled(pipes)
            failure = self._watch.failure()
            if failure is not None:
                raise self._failed(*self._stopped_or(failure))
            if warning := self._watch.warning():
                self._warn(f"warning: {warning}.")
            if (unmet := self._watch.unmet()) and (stopped := self._stopped().intersection(unmet)):
                raise self._failed(min(stopped), _STOPPED)

    def _hear(self, pipes: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 1 << 16)
        if not data:
            pipes.unregister(key.fd)
            os.close(key.fd)
            return
        *lines, self._unread[key.data] = (self._unread.get(key.data, b"") + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a login script at the other end may print something
                sign = json.loads(line)
                if isinstance(sign, dict):
                    self._watch.hear(key.data, sign)

    def _tell_followers(self, line: bytes) -> None:
        for process in self.processes[1:]:
            with contextlib.suppress(OSError):  # it has ended, or its pipe is full
                assert process.stdin is not None, "it was asked for"
                os.write(process.stdin.fileno(), line)

    def _pause(self) -> None:
        self._tell_followers(PAUSED)
        self._signal_here(signal.SIGSTOP)

    def _go_on(self) -> None:
        self._signal_here(signal.SIGCONT)

    def _signal_here(self, number: signal.Signals) -> None:
        """To the processes of this machine, and what they started; the others wait for rank 0 in any case."""
        for host, process in zip(self._hosts.ranks, self.processes, strict=False):
            if host.ssh is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    def _settled(self, pipes: selectors.BaseSelector) -> int:
        """Some process has ended: whose fault it is, or the exit code of rank 0."""
        started, codes = time.monotonic(), [process.poll() for process in self.processes]
        # where the others ended as they were told to, rank 0 is on its way out
        while codes[0] is None and time.monotonic() < started + (_SETTLE_S if any(codes) else _LAST_S):
            for key, _ in pipes.select(timeout=BEAT_S / 2):
                self._hear(pipes, key)
            codes = [process.poll() for process in self.processes]
        if codes[0] is not None and -codes[0] in self._signals:  # ended before it could say so
            return 128 - codes[0]
        is_dead = [code is not None and (code < 0 or self._is_lost(rank, code)) for rank, code in enumerate(codes)]
        if codes[0] is None or codes[0] == RankError.exit_code or any(is_dead):
            raise self._failed(*self._culprit())
        return codes[0] or self._last()

    def _is_lost(self, rank: int, code: int) -> bool:
        return code == LOST and self._hosts.ranks[rank].ssh is not None

    def _culprit(self) -> tuple[int, str]:
        """Who has ended, or stopped, before it could be the others' fault."""
        codes, stopped = [process.poll() for process in self.processes], self._stopped()

        def weight(rank: int) -> int:
            code = codes[rank]
            if code is None:
                return 4 if rank in stopped else 0
            if code < 0:
                return 2 if -code in _CRASHES else 5
            return 3 if self._is_lost(rank, code) else 1 if code else 0

        rank = max(range(len(codes)), key=weight)
        code = codes[rank]
        if code is not None:
            return rank, describe_exit(code, is_remote=self._hosts.ranks[rank].ssh is not None)
        return rank, _STOPPED if weight(rank) else f"did not end within {_LAST_S:.0f} s behind the others"

    def _stopped_or(self, failure: tuple[int, str]) -> tuple[int, str]:
        """The first process that the system holds stopped; others that wait for it may be silent, too."""
        rank = min(self._stopped(), default=failure[0])
        return failure if rank == failure[0] else (rank, _STOPPED)

    def _stopped(self) -> set[int]:
        """The processes of this machine that the system holds stopped."""
        ranks = {process.pid: rank for rank, process in enumerate(self.processes) if process.poll() is None}
        return {ranks[pid] for pid in stopped_pids(ranks)}

    def _last(self) -> int:
        """Rank 0 is done: the others end by themselves."""
        until = time.monotonic() + _LAST_S
        for rank, process in enumerate(self.processes):
            try:
                code = process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise self._failed(rank, f"did not end within {_LAST_S:.0f} s behind the first") from error
            if code:
                raise self._failed(rank, describe_exit(code, is_remote=self._hosts.ranks[rank].ssh is not None))
        return 0

    def _errors(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stderr-{rank}"

    def _failed(self, rank: int, what: str) -> RankError:
        path, pid = self._errors(rank), self._watch.pid(rank) or self.processes[rank].pid
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
        said = f" It said: {lines[-1][:300]}" if lines else ""
        who = f"process {rank} of {len(self.processes)} ({self._hosts.ranks[rank].name}, pid {pid})"
        return RankError(f"{who} {what}; all are ended.{said}")

    def _end(self) -> None:
        remote = [
            (host.ssh, self._watch.pid(rank))
            for rank, host in enumerate(self._hosts.ranks[: len(self.processes)])
            if host.ssh is not None and self.processes[rank].poll() != 0
        ]
        killers = [kill_remote(ssh, pid) for ssh, pid in remote if ssh is not None and pid is not None]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for killer in killers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                killer.wait(timeout=_LAST_S)
            killer.kill()
            killer.wait()
