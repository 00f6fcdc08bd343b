"""The machine and what is installed on it: backend, versions, cores, memory, and on a Mac the wired limit."""

from __future__ import annotations

import os
import re
from importlib import metadata

from qwq_mlx.bench.machine import describe_machine, usable_cores
from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.model.device import available_bytes, limit_bytes, wired
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.memory.plan import metal_limit_bytes, plan_memory
from qwq_mlx.model.upstream import import_mlx, package_version

__all__ = [
    "check_backend",
    "check_cores",
    "check_memory",
    "check_model_folder",
    "check_versions",
    "check_wired_limit",
    "check_working_set",
]

_PROBE_BYTES = 64 << 20
_TOLERANCE = 0.05  # between the recommended working set and ours: systems differ by some MiB
_REQUIREMENT = re.compile(r"([\w.-]+)>=([\d.]+)$")


def check_backend(subject: Subject) -> Result:
    """The backend computes a sum that is known."""
    mx = import_mlx()
    machine = describe_machine()
    described = f"{machine['backend']} on {machine['device']}, {machine['system']}, power: {machine['power']}"
    values = {**machine, "device_info": {name: str(value) for name, value in mx.device_info().items()}}
    total = mx.arange(1000).sum().item()
    if total != 499_500:
        found = f"{described}; the sum of 0 to 999 is {total}"
        return Result(outcome="failed", found=found, expected="499500", values=values)
    return Result(outcome="ok", found=described, values=values)


def check_versions(subject: Subject) -> Result:
    """Every package that this one requires is there, and new enough."""
    requirements = [match for text in _requirements() if (match := _REQUIREMENT.match(text))]
    if not requirements:
        return Result(outcome="not checkable", found="qwq-mlx is not installed (it runs from a checkout)")
    installed = {match[1]: package_version(match[1]) for match in requirements}
    too_old = {match[1]: match[2] for match in requirements if _parts(installed[match[1]]) < _parts(match[2])}
    return Result(
        outcome="failed" if too_old else "ok",
        found=", ".join(f"{name} {version}" for name, version in installed.items()),
        expected=", ".join(f"{name} at least {version}" for name, version in too_old.items()),
        values=installed,
    )


def _requirements() -> list[str]:
    try:
        return metadata.requires("qwq-mlx") or []
    except metadata.PackageNotFoundError:
        return []


def _parts(version: str) -> tuple[int, ...]:
    """The numbers of a version; () for "none", which is less than every version."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version))


def check_cores(subject: Subject) -> Result:
    """Cores that this process may use, and their load."""
    n_usable, n_cores = usable_cores(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    note = "; speeds below are of a busy machine" if load > n_usable / 2 else ""
    return Result(
        outcome="ok",
        found=f"{n_usable} of {n_cores} cores, load {load:.1f}{note}",
        values={"usable": n_usable, "cores": n_cores, "load": round(load, 2)},
    )


def check_memory(subject: Subject) -> Result:
    """The memory of the machine, and what a run may use of it."""
    physical = _physical_bytes()
    limit, available = limit_bytes(), available_bytes()
    is_sound = 0 < available <= physical and limit > 0
    return Result(
        outcome="ok" if is_sound else "failed",
        found=f"{_gb(physical)} in all, {_gb(available)} available, {_gb(limit)} for a run on {subject.backend}",
        expected="" if is_sound else "more than 0, and no more available than there is",
        values={"physical": physical, "available": available, "limit": limit},
    )


def check_working_set(subject: Subject) -> Result:
    """Metal's recommended working set beside the one that `fit` assumes for a Mac of this size."""
    if subject.backend != "metal":
        return Result(outcome="not checkable", found=f"{subject.backend} has no recommended working set")
    recommended, physical = limit_bytes(), _physical_bytes()
    assumed = metal_limit_bytes(physical)
    is_near = abs(recommended / assumed - 1) <= _TOLERANCE
    return Result(
        outcome="ok" if is_near else "failed",
        found=f"{_gb(recommended)} on a Mac of {physical / (1 << 30):.0f} GiB",
        expected=f"{_gb(assumed)} within {_TOLERANCE:.0%} (`--ram` of python -m qwq_mlx.fit assumes it)",
        values={"recommended": recommended, "assumed": assumed, "physical": physical},
    )


def check_wired_limit(subject: Subject) -> Result:
    """On Metal: a run's wired limit is set inside its block, and the old one is back behind it."""
    if subject.backend != "metal":
        return Result(outcome="not checkable", found=f"{subject.backend} has no wired limit")
    before = _wired_limit()
    with wired(_PROBE_BYTES):
        inside = _wired_limit()
    after = _wired_limit()
    is_right = inside == _PROBE_BYTES and after == before
    return Result(
        outcome="ok" if is_right else "failed",
        found=f"{before:,} bytes before, {inside:,} inside, {after:,} afterwards",
        expected=f"{_PROBE_BYTES:,} inside, {before:,} afterwards",
        values={"before": before, "inside": inside, "after": after},
    )


def _wired_limit() -> int:
    """MLX tells the limit only to who sets another one."""
    mx = import_mlx()
    limit = int(mx.set_wired_limit(0))
    mx.set_wired_limit(limit)
    return limit


def check_model_folder(subject: Subject) -> Result:
    """The folder of --model is read from its headers, and its plan fits this machine. Loads no weights."""
    if subject.model_folder is None:
        return Result(outcome="not measured", found="no --model was named")
    files = open_model_folder(subject.model_folder)
    plan = plan_memory(files, limit_bytes=limit_bytes(), backend=subject.backend)
    return Result(
        outcome="ok" if plan.largest_context > 0 else "failed",
        found=f"{files.weights}, {_gb(plan.weights_bytes)} of weights, largest context {plan.largest_context:,} of "
        f"{plan.context:,}",
        expected="" if plan.largest_context > 0 else f"weights and one position within {_gb(plan.limit_bytes or 0)}",
        values={"weights": plan.weights_bytes, "largest_context": plan.largest_context, "peak": plan.peak_bytes},
    )


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
