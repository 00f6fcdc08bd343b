"""`fit --hosts a=16,b=24`: what each of several Macs holds of a model that they hold together (tensor parallel).

Does not: plan layers in turn (pipeline), or know how fast the link between them is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwq_mlx.errors import OptionError
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.memory.plan import MemoryPlan, ModelShape, Workload, metal_limit_bytes, plan_memory

__all__ = ["Host", "parse_hosts", "plan_hosts", "report_of_hosts"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """A Mac and its memory in GiB."""

    name: str
    ram_gib: float


def parse_hosts(text: str) -> list[Host]:
    """The Macs of --hosts. Raises OptionError for a part that is not NAME=GIB, and for a name twice.

    >>> parse_hosts("a=16,b=24")
    [Host(name='a', ram_gib=16.0), Host(name='b', ram_gib=24.0)]
    """
    hosts: list[Host] = []
    for part in text.split(","):
        name, _, ram = part.strip().partition("=")
        try:
            gib = float(ram)
        except ValueError:
            gib = 0.0
        if not name or not 0 < gib < 1e6:
            raise OptionError(f"`hosts` has {part.strip()!r}, expected NAME=GIB, for example a=16,b=24.")
        if any(each.name == name for each in hosts):
            raise OptionError(f"`hosts` names {name} twice. Give each Mac once.")
        hosts.append(Host(name, gib))
    return hosts


def plan_hosts(
    model: ModelFolder | ModelShape, workload: Workload, hosts: list[Host], *, reserve_bytes: int
) -> list[MemoryPlan]:
    """The plan of each Mac, whose part is the same. Raises OptionError where the heads do not divide among them."""
    shared = replace(workload, n_ranks=len(hosts))
    return [
        plan_memory(
            model,
            shared,
            limit_bytes=metal_limit_bytes(int(host.ram_gib * _GIB)),
            reserve_bytes=reserve_bytes,
            backend="metal",
        )
        for host in hosts
    ]


def report_of_hosts(
    model: ModelFolder | ModelShape, name: str, workload: Workload, hosts: list[Host], *, reserve_bytes: int
) -> str:
    """Lines for people: one Mac's arithmetic, what each Mac gives, and which of them would do alone."""
    plans = plan_hosts(model, workload, hosts, reserve_bytes=reserve_bytes)
    lines = [
        f"{name}, held by {len(hosts)} Macs together, each with:",
        replace(plans[0], limit_bytes=None).arithmetic(),
    ]
    lines += ["", "Mac            memory      limit      needs    largest context"]
    for host, plan in zip(hosts, plans, strict=True):
        lines.append(
            f"{host.name:<12}{host.ram_gib:>5g} GiB{(plan.limit_bytes or 0) / 1e9:>8.1f} GB"
            f"{plan.peak_bytes / 1e9:>8.1f} GB{plan.largest_context:>14,}   {'fits' if plan.fits else 'does not fit'}"
        )
    lowest = min(zip(plans, hosts, strict=True), key=lambda each: each[0].largest_context)
    lines.append(f"largest context that fits all: {lowest[0].largest_context:,}; {lowest[1].name} binds")
    alone = [
        host.name
        for host in hosts
        if plan_memory(
            model,
            workload,
            limit_bytes=metal_limit_bytes(int(host.ram_gib * _GIB)),
            reserve_bytes=reserve_bytes,
            backend="metal",
        ).fits
    ]
    if alone:
        lines.append(
            f"{', '.join(alone)} would do alone at this context; one machine decodes faster than two with a slow link"
        )
    return "\n".join(lines)
