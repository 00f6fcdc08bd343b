"""Files and folders that appear whole or not at all, and stay after a power cut.

Bytes go to a temporary name, reach the disk (fsync), and get their name by one rename, which the folder's own fsync
makes last. macOS's fsync stops at the drive's cache, so there F_FULLFSYNC asks the drive as well.

Does not: lock (`lock` does), or make a rename between two file systems atomic.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from qwq_mlx.errors import ConversionError

__all__ = ["exchange", "fsync_file", "fsync_folder", "publish", "replaced_path", "write_file"]

_RENAME_SWAP = 0x2  # macOS, sys/stdio.h
_RENAME_EXCHANGE, _AT_FDCWD = 0x2, -100  # Linux, linux/fs.h and fcntl.h


def fsync_file(fd: int) -> None:
    """Return when the file's bytes are on the disk itself. Raises OSError."""
    if sys.platform == "darwin":
        import fcntl  # Windows has none, and plans (python -m qwq_mlx.fit) are made there too

        with contextlib.suppress(OSError):  # network and FAT volumes have no F_FULLFSYNC; fsync is the best they offer
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def fsync_folder(folder: Path) -> None:
    """Return when the names in the folder are on the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync_file(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes | Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a whole file: after a crash at any moment path holds the old bytes, or all of the new ones.

    data: all bytes, or in parts, each of which is asked for when the one before is written.
    mode: who may do what with it, less what the umask takes.
    Raises OSError (disk full, no permission); the temporary file is then removed. A path that is there and no regular
    file (/dev/stdout, a pipe) is refused: the rename would put a file in its place.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and no regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            fsync_file(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap what two names lead to in one step; False where the system or the file system cannot. Raises OSError.

    Linux: renameat2 with RENAME_EXCHANGE; macOS: renamex_np with RENAME_SWAP (not run on a Mac).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, ctypes.c_uint(_RENAME_SWAP))
    elif sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def replaced_path(final: Path) -> Path:
    """Where publish keeps the folder that it replaces until that is removed."""
    return final.with_name(f"{final.name}.replaced")


def publish(partial: Path, final: Path, *, replace: bool) -> None:
    """Give a finished folder its final name in one step.

    partial: its files are complete and fsynced. final: must not exist, unless replace is true; then the two folders
    are exchanged, so the name leads at every moment to a whole folder, and the old one is removed last. Where the
    system has no exchange, the old folder moves to `replaced_path(final)` first: between the two renames the name is
    free, and a second call after a crash there finishes what the first began.
    Raises ConversionError when final exists and replace is false; OSError.
    """
    old = replaced_path(final)
    fsync_folder(partial)
    if os.path.lexists(final):
        if not replace:
            raise ConversionError(
                f"{final}: exists already. The finished conversion waits in {partial}; "
                "remove the old folder or pass `force=True` to replace it."
            )
        if os.path.lexists(old):
            _remove(old)
        if exchange(partial, final):
            fsync_folder(final.parent)
            partial.rename(old)
        else:
            final.rename(old)
            partial.rename(final)
    else:
        partial.rename(final)
    fsync_folder(final.parent)
    if replace and os.path.lexists(old):
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
