"""How much memory this process has needed.

Does not: predict it (the plan does).
"""

from __future__ import annotations

import resource
import sys

__all__ = ["peak_memory_bytes"]


def peak_memory_bytes() -> int:
    """The most resident memory that this process has had, in bytes (getrusage counts kB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
