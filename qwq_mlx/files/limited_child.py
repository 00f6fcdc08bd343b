"""A script run as a child process with limits of CPU, memory and wall time, for programs that come from strangers.

The child is started isolated (`python -I`), so that neither the current folder nor the environment is on its path, sets
its limits before anything else, and then runs the script, which reads one JSON object on stdin and writes its result on
stdout. On macOS the memory limit is advisory (not measured there); the CPU limit and the parent's clock hold.

Does not: keep the script from reading files; each script imports nothing that would.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["run_limited"]


def run_limited(
    script: Path, request: Mapping[str, Any], *, cpu_s: int, memory_bytes: int, wall_s: float
) -> subprocess.CompletedProcess[bytes] | None:
    """Run a script with `request` on its stdin; its exit status, stdout and stderr, or None where wall_s went by.

    cpu_s: the child is ended by SIGXCPU then. memory_bytes: of address space; more fails in the child.
    """
    try:
        return subprocess.run(
            [sys.executable, "-I", __file__, str(script), str(cpu_s), str(memory_bytes)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=wall_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def _limit(cpu_s: int, memory_bytes: int) -> None:
    import resource  # Windows has none; there no child is started

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        try:
            resource.setrlimit(kind, (memory_bytes, memory_bytes))
        except (OSError, ValueError):  # macOS refuses limits below what is mapped already
            continue


def _main() -> None:
    """In the child."""
    script, cpu_s, memory_bytes = sys.argv[1:]
    _limit(int(cpu_s), int(memory_bytes))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _main()
