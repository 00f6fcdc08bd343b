"""What a measurement was made on: device, backend, power source, versions, commit, and how fast its memory is read.

Does not: measure a model.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwq_mlx.model.device import available_bytes, backend_name, limit_bytes
from qwq_mlx.model.upstream import import_mlx, package_version

__all__ = ["commit", "describe_machine", "power_source", "read_bandwidth", "usable_cores"]

PACKAGES = ("mlx", "mlx-lm", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub")

_SUPPLIES = Path("/sys/class/power_supply")
_CHECKOUT = Path(__file__).resolve().parents[2]
_LARGEST_READ = {"cpu": 256 << 20, "metal": 1 << 30, "cuda": 1 << 30}
_READS = 8  # in one evaluation, so that waiting for the device is a small part


def describe_machine() -> dict[str, str]:
    """Device, backend, system, power source, versions and commit."""
    mx = import_mlx()
    return {
        "device": str(mx.device_info().get("device_name") or platform.processor() or platform.machine()),
        "backend": backend_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": f"{usable_cores()} of {os.cpu_count()}",
        "power": power_source(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "qwq-mlx": package_version("qwq-mlx"),
        "commit": commit(),
    }


def usable_cores() -> int:
    """Cores that this process may run on, which a container or an affinity mask can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def power_source() -> str:
    """ "AC power", "battery", or "unknown" where the system does not say. Macs on battery may run slower."""
    if platform.system() == "Darwin":
        said = _first_line("pmset", "-g", "batt")
        return "AC power" if "AC Power" in said else "battery" if "Battery Power" in said else "unknown"
    try:
        is_online = [path.read_text().strip() == "1" for path in _SUPPLIES.glob("*/online")]
    except OSError:
        return "unknown"
    return "unknown" if not is_online else "AC power" if any(is_online) else "battery"


def commit(checkout: Path = _CHECKOUT) -> str:
    """The commit of the checkout that this package lies in, "-dirty" behind it where files differ; else "unknown"."""
    if not (checkout / ".git").exists():
        return "unknown"
    return _first_line("git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty") or "unknown"


def _first_line(*command: str) -> str:
    """The first line that a command prints; "" where it is missing, fails or takes more than 5 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.partition("\n")[0].strip()


def read_bandwidth(n_bytes: int | None = None) -> float:
    """Bytes per second of reading a large array, the median of 5 after one warm-up.

    n_bytes: of the array; None is 1 GiB on a GPU and 256 MiB on the CPU, at most a sixteenth of what is free.
    On a GPU by MLX's sum; on the CPU by numpy's dot product of its halves, because MLX's sum there is not limited by
    the memory.
    """
    backend = backend_name()
    if n_bytes is None:
        n_bytes = min(_LARGEST_READ[backend], limit_bytes() // 16, available_bytes() // 16)
    read = _cpu_read(n_bytes) if backend == "cpu" else _gpu_read(n_bytes)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return n_bytes * _READS / statistics.median(seconds[1:])


def _cpu_read(n_bytes: int) -> Any:
    values = np.ones((2, n_bytes // 8), np.float32)
    return lambda: [np.dot(values[0], values[1]) for _ in range(_READS)]


def _gpu_read(n_bytes: int) -> Any:
    mx = import_mlx()
    values = mx.ones((n_bytes // 4,), mx.float32)
    mx.eval(values)
    return lambda: mx.eval([values.sum() for _ in range(_READS)])
