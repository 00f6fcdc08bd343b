"""How much memory this process has, and has needed.

Does not: predict it (the plan does).
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

__all__ = ["peak_memory_bytes", "release_freed_memory", "resident_bytes"]

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most resident memory that this process has had, in bytes.

    Linux: VmHWM, for getrusage's figure starts at the memory of the process that started this one (an exec keeps it).
    macOS: getrusage, in bytes.
    """
    return _status_bytes("VmHWM") or _rusage_bytes()


def resident_bytes() -> int:
    """The resident memory that this process has now, in bytes; off Linux the most that it has had."""
    return _status_bytes("VmRSS") or _rusage_bytes()


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it until it is asked (glibc)."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _status_bytes(key: str) -> int | None:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
