"""The system is asked to read files into its cache before anybody waits for them.

Weights are read once the libraries that use them are imported, which takes a second or two of a processor and nothing
of a disk. Both systems take advice for it: posix_fadvise on Linux, fcntl's F_RDADVISE on macOS (not measured on Metal);
elsewhere nothing happens. What is read so is file cache, which goes when memory is needed.

Does not: read into this process, wait, or fail: a file that cannot be opened is for its reader to name.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["read_ahead"]

_F_RDADVISE = 44  # of macOS's sys/fcntl.h; its argument is struct radvisory { off_t ra_offset; int ra_count; }
_ADVISED_BYTES = 128 << 10
"""At a time. Linux reads no more for one piece of advice than its device reads ahead, 128 KiB where nobody chose: of
256 MiB asked for at once only the first 8 MiB came, 4 % of a file of 421 MB (2026-11-28)."""


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Ask for whole files, one after another; returns at once. The thread may be joined, and ends with the process."""
    thread = threading.Thread(target=_advise_all, args=(tuple(paths),), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _advise_all(paths: tuple[Path, ...]) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            _advise(fd, os.fstat(fd).st_size)
        except OSError:
            return  # a file system that takes no advice
        finally:
            os.close(fd)


def _advise(fd: int, n_bytes: int) -> None:
    """Raises OSError."""
    for first in range(0, n_bytes, _ADVISED_BYTES):
        count = min(_ADVISED_BYTES, n_bytes - first)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, _F_RDADVISE, struct.pack("qi", first, count))
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, first, count, os.POSIX_FADV_WILLNEED)
