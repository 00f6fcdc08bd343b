"""`fit --hosts a=16,b=24`: what each of several Macs holds of a model that they hold together, and which way is faster.

Does not: start anything there, or measure (`model.link_speed` does, where ranks run).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwq_mlx.errors import FitError, OptionError
from qwq_mlx.fit.speed import breakeven_s, link_text, token_s
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.link_speed import LinkSpeed
from qwq_mlx.model.memory.plan import MemoryPlan, ModelShape, Workload, metal_limit_bytes, plan_memory
from qwq_mlx.model.memory.sizes import bytes_of_float, embedding_bytes
from qwq_mlx.model.memory.splits import binding_rank, pipeline_split, plan_ranks
from qwq_mlx.model.split import Split, SplitKind, tensor_obstacle, tensor_split

__all__ = ["Host", "HostsPlan", "Way", "as_json", "parse_hosts", "plan_hosts", "report_of_hosts"]

_GIB = 1 << 30
_PHRASES: dict[SplitKind, str] = {"tensor": "tensor parallel", "pipeline": "a pipeline"}
_BYTES_PER_S = 100e9  # of memory: an M2 or M3; 68 GB/s is an M1's, 120 an M4's, 273 an M4 Pro's, 400 an M3 Max's


@dataclass(frozen=True, slots=True)
class Host:
    """A Mac, its memory in GiB, and how fast that is read."""

    name: str
    ram_gib: float
    bytes_per_s: float = _BYTES_PER_S

    @property
    def limit_bytes(self) -> int:
        """What Metal gives there."""
        return metal_limit_bytes(int(self.ram_gib * _GIB))


def parse_hosts(text: str) -> list[Host]:
    """The Macs of --hosts. Raises OptionError for a part that is not NAME=GIB[@GB/s], and for a name twice.

    >>> parse_hosts("a=16,b=24@120")
    [Host(name='a', ram_gib=16.0, bytes_per_s=100000000000.0), Host(name='b', ram_gib=24.0, bytes_per_s=120000000000.0)]
    """
    hosts: list[Host] = []
    for part in text.split(","):
        name, _, values = part.strip().partition("=")
        ram, at, rate = values.partition("@")
        try:
            gib, rate_gb = float(ram), float(rate) if at else _BYTES_PER_S / 1e9
        except ValueError:
            gib = rate_gb = 0.0
        if not name or not 0 < gib < 1e6 or not 0 < rate_gb < 1e6:
            raise OptionError(
                f"`hosts` has {part.strip()!r}, expected NAME=GIB or NAME=GIB@GB/s, for example a=16,b=24@120."
            )
        if any(each.name == name for each in hosts):
            raise OptionError(f"`hosts` names {name} twice. Give each Mac once.")
        hosts.append(Host(name, gib, rate_gb * 1e9))
    if len(hosts) < 2:
        raise OptionError(f"`hosts` names one Mac, expected several. Plan one by --ram {hosts[0].ram_gib:g}.")
    return hosts


@dataclass(frozen=True, slots=True)
class Way:
    """A split with the plan of each Mac.

    token_s: seconds of a token, with a link that takes no time where none is known.
    """

    split: Split
    plans: list[MemoryPlan]
    token_s: float

    @property
    def title(self) -> str:
        """What the split is called."""
        return _PHRASES[self.split.kind].removeprefix("a ")

    @property
    def fits(self) -> bool:
        """Whether every Mac can hold its part."""
        return all(plan.fits for plan in self.plans)


@dataclass(frozen=True, slots=True)
class HostsPlan:
    """All that can be said of a model and some Macs.

    config: of the model.
    ways: splits that are possible.
    obstacles: why others are not.
    alone: seconds of a token on each Mac that can hold the model alone.
    """

    config: Qwen2Config
    ways: list[Way]
    obstacles: list[str]
    alone: dict[str, float]

    @property
    def best(self) -> Way | None:
        """The fastest of those that fit; else the one that reaches the longest context."""
        fitting = [way for way in self.ways if way.fits]
        if fitting:
            return min(fitting, key=lambda way: way.token_s)
        return max(self.ways, key=lambda way: min(each.largest_context for each in way.plans), default=None)


def plan_hosts(
    model: ModelFolder | ModelShape,
    workload: Workload,
    hosts: Sequence[Host],
    link: LinkSpeed | None,
    *,
    reserve_bytes: int,
) -> HostsPlan:
    """All ways to hold the model on these Macs. The first is rank 0: it draws, and has the output matrix."""
    config, limits, rates = model.config, [each.limit_bytes for each in hosts], [each.bytes_per_s for each in hosts]
    splits, obstacles = [], []
    if obstacle := tensor_obstacle(config, model.packed, len(hosts)):
        obstacles.append(f"tensor parallel is not possible: {obstacle}")
    else:
        splits.append(tensor_split(config, len(hosts)))
    try:
        splits.append(pipeline_split(model, workload, limits, reserve_bytes=reserve_bytes))
    except (OptionError, FitError) as error:
        obstacles.append(f"a pipeline is not possible: {error}")
    unread = embedding_bytes(config, model.packed, bytes_of_float(workload, "metal"))
    ways = []
    for split in splits:
        plans = plan_ranks(model, workload, split, limits, reserve_bytes=reserve_bytes)
        read = [
            plan.weights_bytes - unread * split.holds("model.embed_tokens.weight", rank, config)
            for rank, plan in enumerate(plans)
        ]
        ways.append(Way(split, plans, token_s(split, read, rates, config, link)))
    whole = [plan_memory(model, workload, limit_bytes=limit, reserve_bytes=reserve_bytes) for limit in limits]
    alone = {
        host.name: (plan.weights_bytes - unread) / host.bytes_per_s
        for host, plan in zip(hosts, whole, strict=True)
        if plan.fits
    }
    return HostsPlan(config, ways, obstacles, alone)


def report_of_hosts(plan: HostsPlan, name: str, hosts: Sequence[Host], link: LinkSpeed | None) -> str:
    """Lines for people: what each Mac holds either way, what binds, and which way is the fastest."""
    lines = [f"{name}, held by {len(hosts)} Macs together"]
    for way in plan.ways:
        lines += ["", *_table(way, hosts)]
    lines += ["", *plan.obstacles, *_advice(plan, hosts, link)]
    return "\n".join(lines)


def _table(way: Way, hosts: Sequence[Host]) -> list[str]:
    lines = [f"{way.title:<22}holds             weights  KV cache   buffers     limit     needs   largest context"]
    for rank, (host, plan) in enumerate(zip(hosts, way.plans, strict=True)):
        beside = plan.peak_bytes - plan.weights_bytes - plan.kv_bytes
        sizes = (plan.weights_bytes, plan.kv_bytes, beside, plan.limit_bytes or 0, plan.peak_bytes)
        columns = "".join(f"{size / 1e9:>7.1f} GB" for size in sizes)
        fits = "" if plan.fits else "   does not fit"
        lines.append(
            f"{host.name:<12}{host.ram_gib:>5g} GiB {way.split.describe(rank):<15}{columns}"
            f"{plan.largest_context:>18,}{fits}"
        )
    rank = binding_rank(way.plans)
    lines.append(
        f"largest context that fits all: {way.plans[rank].largest_context:,}; {hosts[rank].name} binds, by its "
        f"{way.plans[rank].binds}"
    )
    return lines


def _advice(plan: HostsPlan, hosts: Sequence[Host], link: LinkSpeed | None) -> list[str]:
    """Which way is the fastest, with the arithmetic."""
    times = {way.title: way.token_s for way in plan.ways}
    times.update({f"{name} alone": seconds for name, seconds in plan.alone.items()})
    said = ", ".join(f"{what} {seconds * 1e3:.0f} ms" for what, seconds in times.items())
    rates = ", ".join(f"{host.name} {host.bytes_per_s / 1e9:g}" for host in hosts)
    by = "a link that takes no time" if link is None else f"the link {link_text(link)}"
    lines = [f"a token takes at least: {said} (memory read at {rates} GB/s, {by})"] if times else []
    best, fastest = plan.best, min(plan.alone, key=plan.alone.__getitem__, default=None)
    if best is None or not best.fits:
        alone = [] if fastest is None else [f"{fastest} alone holds the model at this context"]
        return [*lines, _what_would_fit(plan), *alone]
    kinds = {way.split.kind: way.token_s for way in plan.ways if way.fits}
    if link is None and len(kinds) == 2:
        most = breakeven_s(kinds["tensor"], kinds["pipeline"], plan.config, len(hosts))
        lines.append(
            "tensor parallel is faster than a pipeline where a sum of 10 kB takes less than "
            f"{most * 1e6:.0f} us; --measure-link measures that, --link takes it"
            if most > 0
            else "a pipeline is faster than tensor parallel, whatever the link: the slowest Mac holds little of it"
        )
    if fastest is not None and plan.alone[fastest] <= best.token_s:
        lines.append(f"{fastest} alone is the fastest at this context")
    elif link is not None:
        lines.append(f"{_PHRASES[best.split.kind]} is the fastest")
    return lines


def _what_would_fit(plan: HostsPlan) -> str:
    if plan.best is None:
        return "no split of this model fits these Macs"
    context = min(each.largest_context for each in plan.best.plans)
    if context < 2:
        return "none of these fits, whatever the context: take fewer bits, or more memory"
    phrase = _PHRASES[plan.best.split.kind]
    return f"none of these fits at {plan.best.plans[0].context:,} positions; {phrase} does with --context {context}"


def as_json(plan: HostsPlan, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """The ways as plain data, the plans of each by the names of the Macs."""
    return [
        {
            "split": asdict(way.split),
            "token_s": way.token_s,
            "hosts": {
                host.name: {**asdict(each), "peak_bytes": each.peak_bytes, "fits": each.fits, "binds": each.binds}
                for host, each in zip(hosts, way.plans, strict=True)
            },
        }
        for way in plan.ways
    ]
