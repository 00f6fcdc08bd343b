"""A disk that fails: crashes at the N-th operation, tears a write, fills up, breaks, or forgets what was not synced.

The operations by which the converter changes the disk are wrapped where they live, in `os`. A crash is an exception
that no code catches, and from then on every operation raises it too, so no clean-up reaches the disk: what lies there
is what a kill -9 leaves. For a power cut the state of every file and folder at its last fsync is kept, and the tree is
put back to it; what was not synced is lost, or by lot kept, as a drive that reorders writes does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from qwq_mlx.files import atomic

OPERATIONS = ("pwrite", "write", "ftruncate", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
_WRITES = ("pwrite", "write", "ftruncate", "fsync", "mkdir")


class CrashError(BaseException):
    """The process is as good as dead."""


class FaultyDisk:
    """`with FaultyDisk(root, at=N, kind=...) as disk:` runs the body on a disk that fails at operation N.

    kind: "kill" (before the operation), "torn" (in the middle of a write), "full", "broken" (errors from then on), or
    "count" (never). n_operations: how many came. A crash ends the body silently; `crashed` says so.
    """

    def __init__(self, root: Path, *, at: int = -1, kind: str = "count") -> None:
        self.root, self.at, self.kind = root, at, kind
        self.n_operations = 0
        self.operations: list[str] = []
        self.crashed = False
        self._real = {name: getattr(os, name) for name in (*OPERATIONS, "open", "close")}
        self._real_fcntl, self._real_getpid = fcntl.fcntl, os.getpid
        self._open: set[int] = set()
        self._lock = threading.RLock()
        self._files: dict[int, bytes] = {}  # inode -> bytes at its last fsync
        self._folders: dict[int, dict[str, int]] = {}  # inode -> names at its last fsync
        self._keep()

    def __enter__(self) -> FaultyDisk:
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name))
        os.open, os.close = self._opened, self._closed
        fcntl.fcntl = self._fcntl
        self._real_exchange, atomic.exchange = atomic.exchange, self._exchange
        os.getpid = lambda: 10_000_000  # another process than the one that goes on afterwards
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for name, real in self._real.items():
            setattr(os, name, real)
        fcntl.fcntl, os.getpid = self._real_fcntl, self._real_getpid
        atomic.exchange = self._real_exchange
        for fd in self._open:  # a dead process holds no file and no lock
            with contextlib.suppress(OSError):
                os.close(fd)
        return isinstance(error, CrashError)

    def _wrapped(self, name: str) -> Any:
        real = self._real[name]

        def operation(*arguments: Any, **options: Any) -> Any:
            if name == "write" and not stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                return real(*arguments, **options)  # a pipe to a child process is no disk
            with self._lock:
                if self.crashed:
                    raise CrashError
                n, self.n_operations = self.n_operations, self.n_operations + 1
                self.operations.append(name)
                if n == self.at and self.kind in ("kill", "torn"):
                    if self.kind == "torn" and name in ("pwrite", "write"):
                        fd, data, *rest = arguments
                        real(fd, bytes(data)[: len(data) // 2], *rest)
                    self.crashed = True
                    raise CrashError
                if n >= self.at >= 0 and self.kind in ("full", "broken") and name in _WRITES:
                    code = errno.ENOSPC if self.kind == "full" else errno.EIO
                    raise OSError(code, os.strerror(code))
                result = real(*arguments, **options)
                if name == "fsync":
                    self._synced(arguments[0])
                return result

        return operation

    def _fcntl(self, fd: int, command: int, *rest: Any) -> Any:
        """macOS's way to sync counts as fsync."""
        if command == getattr(fcntl, "F_FULLFSYNC", None):
            return os.fsync(fd)
        return self._real_fcntl(fd, command, *rest)

    def _exchange(self, one: Path, other: Path) -> bool:
        """Two names swapped by a system call that `os` does not have; one operation more."""
        with self._lock:
            if self.crashed:
                raise CrashError
            n, self.n_operations = self.n_operations, self.n_operations + 1
            self.operations.append("exchange")
            if n == self.at and self.kind in ("kill", "torn"):
                self.crashed = True
                raise CrashError
            return self._real_exchange(one, other)

    def _opened(self, *arguments: Any, **options: Any) -> int:
        fd: int = self._real["open"](*arguments, **options)
        self._open.add(fd)
        return fd

    def _closed(self, fd: int) -> None:
        self._open.discard(fd)
        self._real["close"](fd)

    def _keep(self) -> None:
        """Everything that is there already is durable."""
        for folder, names, files in os.walk(self.root):
            self._folders[Path(folder).stat().st_ino] = {
                name: os.lstat(Path(folder) / name).st_ino for name in (*names, *files)
            }
            for name in files:
                path = Path(folder) / name
                self._files[path.stat().st_ino] = path.read_bytes()

    def _synced(self, fd: int) -> None:
        status = os.fstat(fd)
        path = next((each for each in self._tree() if each.lstat().st_ino == status.st_ino), None)
        if path is None:
            return
        if path.is_dir():
            self._folders[status.st_ino] = {each.name: each.lstat().st_ino for each in path.iterdir()}
        else:
            self._files[status.st_ino] = path.read_bytes()

    def _tree(self) -> list[Path]:
        return [self.root, *self.root.rglob("*")]

    def lose_power(self, lot: random.Random | None = None) -> None:
        """Put the tree back to what was synced; `lot` decides for each file and folder whether newer content stays."""
        now_folders = {
            path.stat().st_ino: {each.name: each.lstat().st_ino for each in path.iterdir()}
            for path in self._tree()
            if path.is_dir()
        }
        now_files = {path.stat().st_ino: path.read_bytes() for path in self._tree() if path.is_file()}

        def survived() -> bool:
            return lot is not None and lot.random() < 0.5

        def build(inode: int, target: Path) -> None:
            if inode in now_folders or inode in self._folders:
                synced = self._folders.get(inode, {})
                names = {**synced, **now_folders.get(inode, {})} if survived() else synced
                target.mkdir()
                for name, child in names.items():
                    build(child, target / name)
            elif survived():
                target.write_bytes(now_files.get(inode, b""))
            else:
                target.write_bytes(self._files.get(inode, b""))

        rebuilt = self.root.with_name(f"{self.root.name}-after")
        build(self.root.stat().st_ino, rebuilt)
        shutil.rmtree(self.root)
        rebuilt.rename(self.root)
