"""What this machine gives a model: how much memory, and on a Mac that the weights stay in it.

On Metal the limit is the recommended working set that the system itself names, and for a run the planned bytes are
wired, so that macOS does not page weights out between tokens; the old wired limit is put back afterwards. Not more than
the plan is wired, though the system would take more: a Mac whose wired memory is full stops responding (mlx#3186,
mlx-lm#883). On CUDA the limit is the free memory, on the CPU what the system calls available, or what is left of the
container's limit: who exceeds that is killed without a word.

Does not: raise a system limit, or wire anything off Metal. Nothing here is measured on Metal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_mlx.model.memory.plan import Backend
from qwq_mlx.model.upstream import import_mlx

__all__ = ["CACHE_BYTES", "available_bytes", "backend_name", "limit_bytes", "memory_limit", "small_cache", "wired"]

CACHE_BYTES = 256 << 20  # blocks and layers are of few sizes, so little is enough to use their buffers again

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Of control groups, version 2 and 1: their name in _OWN_GROUPS, where they are mounted, limit, use, and in memory.stat
# the part of the use that is file cache, which goes when memory is needed.
# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory
_GROUPS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# The wired limit belongs to the process, and so do the blocks that are in it and the limit found before the first.
_wired: list[int] = []
_found: list[int] = []


def backend_name() -> Backend:
    """The backend MLX computes on. Raises BackendError where it has none."""
    mx = import_mlx()
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def limit_bytes() -> int:
    """Bytes that a run may use on this machine's backend."""
    mx = import_mlx()
    backend = backend_name()
    if backend == "cpu":
        return available_bytes()
    info = mx.device_info()
    if backend == "metal":
        return int(info["max_recommended_working_set_size"])
    return int(info.get("free_memory") or info["total_memory"])


def available_bytes() -> int:
    """Memory that this process can still get without swapping; where the system does not say, all physical memory.

    On Linux not more than its control groups (a container's limit, a batch job's) leave.
    """
    return min([_free_bytes(), *_left_in_groups()])


def _free_bytes() -> int:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups() -> Iterator[int]:
    """What each control group that limits this process leaves, from its own up to the outermost that is seen."""
    if not _OWN_GROUPS.is_file():
        return
    lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    for controller, root, limit, used, cache in _GROUPS:
        cgroup = next((Path(path.lstrip("/")) for _, names, path in lines if controller in names.split(",")), Path())
        for folder in (root / part for part in (cgroup, *cgroup.parents)):
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                text = (folder / limit).read_text().strip()
                if text != "max":
                    yield max(0, int(text) - int((folder / used).read_text()) + int(stat.get(cache, 0)))
            except OSError:
                continue  # the other version's, or a folder of the host that a container does not see


@contextmanager
def wired(n_bytes: int) -> Iterator[None]:
    """Keep up to n_bytes of MLX's memory wired inside the block, never more than the recommended working set.

    Runs under way at the same time share the largest of their limits; the last to end puts the old one back, in
    whatever order they end. Does nothing off Metal. All work that was started must be finished, or waited for, before
    the block ends; it waits.
    """
    mx = import_mlx()
    if backend_name() != "metal":
        yield
        return
    before = mx.set_wired_limit(min(max(n_bytes, *_wired, 0), limit_bytes()))
    if not _wired:
        _found.append(before)
    _wired.append(n_bytes)
    try:
        yield
    finally:
        mx.synchronize()
        _wired.remove(n_bytes)
        mx.set_wired_limit(min(max(_wired), limit_bytes()) if _wired else _found.pop())


@contextmanager
def small_cache(n_bytes: int = CACHE_BYTES) -> Iterator[None]:
    """Bound what MLX keeps of freed memory inside the block, and put the caller's limit back."""
    mx = import_mlx()
    before = mx.set_cache_limit(n_bytes)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Let MLX wait for work under way where it holds more than n_bytes, and put the caller's limit back.

    Left to itself it allocates all that a graph needs ahead of the device, so a training step would hold the
    intermediates of every layer at once, whatever they come to.
    """
    mx = import_mlx()
    before = mx.set_memory_limit(n_bytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before)
