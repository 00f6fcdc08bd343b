"""Files opened and read at a position, also where the system has no pread (Windows, where only plans are made).

Does not: parse anything.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qwq_mlx.errors import SourceError, system_said

__all__ = ["open_to_read", "read_at", "read_regular_file", "recognise"]

_BLOCK_BYTES = 64 << 20


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


def read_regular_file(path: Path, *, limit_bytes: int, expected: str, advice: str) -> bytes:
    """All bytes of a file. expected: what it should be, in the message for a FIFO or a device.

    Raises SourceError: not there, not readable, not a regular file, or longer than limit_bytes.
    """
    try:
        fd = open_to_read(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: there is no such file. {advice}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened {system_said(error, advice)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path}: is not a regular file, expected {expected}. {advice}")
        if status.st_size > limit_bytes:
            raise SourceError(f"{path}: has {status.st_size:,} bytes, expected at most {limit_bytes:,}. {advice}")
        return b"".join(_blocks(fd, status.st_size))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, advice)}") from error
    finally:
        os.close(fd)


def _blocks(fd: int, n_bytes: int) -> Iterator[bytes]:
    """At most n_bytes; Linux reads less than 2 GiB at once."""
    start = 0
    while start < n_bytes and (block := read_at(fd, min(n_bytes - start, _BLOCK_BYTES), start)):
        yield block
        start += len(block)


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
