"""How much memory this process has needed.

Does not: predict it (the plan does).
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["peak_memory_bytes"]

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most resident memory that this process has had, in bytes.

    Linux: VmHWM, for getrusage's figure starts at the memory of the process that started this one (an exec keeps it).
    macOS: getrusage, in bytes.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
