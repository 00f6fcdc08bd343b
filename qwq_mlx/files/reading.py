"""Files opened and read at a position, also where the system has no pread (Windows, where only plans are made).

Does not: say what went wrong in words; callers turn OSError into theirs.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["open_to_read", "read_at", "recognise"]


def open_to_read(path: Path) -> int:
    """A descriptor, without waiting: a FIFO would otherwise block for ever. Raises OSError."""
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # POSIX has the first two, Windows the last
        flags |= getattr(os, name, 0)
    return os.open(path, flags)


def read_at(fd: int, n_bytes: int, start: int) -> bytes:
    """At most n_bytes from a position on. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(fd, n_bytes, start)
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, n_bytes)


def recognise(first: bytes) -> str | None:
    """What a file is, by its first bytes, if it is one of those that often stand in another's place."""
    text = first.lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    signatures = (
        (b"version https://git-lfs", "a git-lfs pointer, not the file it points to"),
        (b"<!doctype", "an HTML page"),
        (b"<html", "an HTML page"),
        (b"<?xml", "an XML page"),
        (b'{"error', "a JSON error message"),
        (b"pk\x03\x04", "a zip archive (PyTorch's format)"),
        (b"gguf", "a GGUF file"),
    )
    return next((name for start, name in signatures if text.startswith(start)), None)
