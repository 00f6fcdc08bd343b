"""One process at a time on one output folder.

The lock is the kernel's (flock) on a small file beside the folder, so it ends with its process however that dies, and a
stale file locks nothing. The file says who holds it, for the message that a second process gets.

Does not: lock out programs that do not ask, or work across machines on network file systems without flock.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from qwq_mlx.errors import ConversionError, DiskFullError, system_said

__all__ = ["FolderLock"]


class FolderLock:
    """`with FolderLock(output):` holds the lock of an output folder, which need not exist yet; its parent must.

    Raises ConversionError naming the process that holds it, or why the file system cannot lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.lock")
        self._fd: int | None = None

    def __enter__(self) -> FolderLock:
        while self._fd is None:
            self._fd = self._take()
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            self.__exit__(None, None, None)
            raise _unmade(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            self.path.unlink(missing_ok=True)  # while it is held: whoever waits for the old file notices in _take
            os.close(self._fd)
            self._fd = None

    def _take(self) -> int | None:
        """A locked descriptor, or None when the file was removed by its last holder meanwhile."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unmade(self.path, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(self.path) and os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                return fd
            os.close(fd)
            return None
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(fd)
            raise ConversionError(
                f"{self.folder}: {holder} is writing it. Wait for that process to end, or choose another output."
            ) from error
        except OSError as error:
            os.close(fd)
            raise ConversionError(
                f"{self.path}: this file system cannot lock ({error.strerror}). Choose an output on a local disk."
            ) from error


def _unmade(path: Path, error: OSError) -> ConversionError:
    if DiskFullError.is_meant_by(error):
        return DiskFullError(f"{path}: {DiskFullError.reason(error)} ({error.strerror}). Make room and run it again.")
    return ConversionError(f"{path}: cannot be made {system_said(error, 'Choose an output where you may write.')}")
