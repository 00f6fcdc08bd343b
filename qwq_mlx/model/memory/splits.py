"""How a model is split over machines: what each then needs, and how many layers of a pipeline each can hold.

A tensor split gives each rank as much as the others, so the one with the least memory decides. In a pipeline each rank
is filled to the same share of its memory, so that a small machine holds few layers and all reach the same context.

Does not: know how fast machines or links are (`fit` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qwq_mlx.errors import FitError, OptionError
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.memory.plan import (
    RESERVE_BYTES,
    Backend,
    MemoryPlan,
    ModelShape,
    Workload,
    largest_where,
    plan_memory,
)
from qwq_mlx.model.memory.sizes import bytes_of_float, layer_weights_bytes, weights_bytes
from qwq_mlx.model.split import Split, SplitKind, tensor_obstacle, tensor_split

__all__ = ["binding_rank", "choose_split", "pipeline_split", "plan_ranks", "plan_tightest_rank", "tightest_plan"]

_LEAST_CONTEXT = 2  # an id to read and one to write
_STEPS = 20  # of the bisection for the share of memory


def plan_ranks(
    model: ModelFolder | ModelShape,
    workload: Workload,
    split: Split,
    limits: Sequence[int | None],
    *,
    backend: Backend = "metal",
    reserve_bytes: int = RESERVE_BYTES,
) -> list[MemoryPlan]:
    """The plan of each rank. limits: what each one's device gives. Raises OptionError where the split is impossible."""
    return [
        plan_memory(
            model,
            replace(workload, split=split, rank=rank),
            limit_bytes=limit,
            reserve_bytes=reserve_bytes,
            backend=backend,
        )
        for rank, limit in enumerate(limits)
    ]


def binding_rank(plans: Sequence[MemoryPlan]) -> int:
    """The rank that reaches the shortest context, of several the one with the least room left."""
    return min(range(len(plans)), key=lambda rank: (plans[rank].largest_context, _room(plans[rank])))


def _room(plan: MemoryPlan) -> int:
    return (plan.limit_bytes or 1 << 62) - plan.peak_bytes


def tightest_plan(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """The plan that leaves the least room: where that fits, all do."""
    return min(plans, key=_room)


def plan_tightest_rank(
    model: ModelFolder | ModelShape,
    workload: Workload,
    limits: Sequence[int | None],
    *,
    backend: Backend = "metal",
    held_bytes: int = 0,
) -> MemoryPlan:
    """The plan of the rank that has the least room left with a workload, whose context is known: all fit if it does.

    held_bytes: what rank 0 holds of KV caches besides; the others hold as much by their layers.
    """
    split = workload.split
    assert split is not None, "several processes hold the model"
    held = [held_bytes * n // split.n_layers[0] for n in split.n_layers]
    free = [None if limit is None else limit - n for limit, n in zip(limits, held, strict=True)]
    plans = plan_ranks(model, workload, split, free, backend=backend)
    return tightest_plan(plans)


def choose_split(
    model: ModelFolder | ModelShape,
    workload: Workload,
    limits: Sequence[int | None],
    *,
    kind: SplitKind | None = None,
    backend: Backend = "metal",
    reserve_bytes: int = RESERVE_BYTES,
) -> Split:
    """The split of a kind; None takes tensor parallel where the heads divide and every rank then reaches the context
    that is asked for, or the model's own, else the one that reaches the longer context.

    Raises OptionError for a kind that is not possible, FitError where neither fits.
    """
    n_ranks, wanted = len(limits), workload.context or model.config.max_position_embeddings
    if kind == "pipeline" or (kind is None and tensor_obstacle(model.config, model.packed, n_ranks) is not None):
        return pipeline_split(model, workload, limits, backend=backend, reserve_bytes=reserve_bytes)
    tensor = tensor_split(model.config, n_ranks)
    plans = plan_ranks(model, workload, tensor, limits, backend=backend, reserve_bytes=reserve_bytes)
    reached = min(plan.largest_context for plan in plans)
    if kind == "tensor" or all(plan.fits for plan in plans) or reached >= wanted:
        return tensor
    try:
        pipeline = pipeline_split(model, workload, limits, backend=backend, reserve_bytes=reserve_bytes)
    except (OptionError, FitError):
        if reached < _LEAST_CONTEXT:
            raise
        return tensor
    others = plan_ranks(model, workload, pipeline, limits, backend=backend, reserve_bytes=reserve_bytes)
    return tensor if reached >= min(plan.largest_context for plan in others) else pipeline


def pipeline_split(
    model: ModelFolder | ModelShape,
    workload: Workload,
    limits: Sequence[int | None],
    *,
    backend: Backend = "metal",
    reserve_bytes: int = RESERVE_BYTES,
) -> Split:
    """Consecutive layers for each rank by its memory, for the context asked for, or for the longest that fits.

    limits: what each rank's device gives; None anywhere splits as among machines that are alike.
    Raises OptionError for more ranks than layers, FitError where the layers do not fit at any context.
    """
    n_ranks, n_layers = len(limits), model.config.num_hidden_layers
    if n_ranks > n_layers:
        raise OptionError(f"{n_ranks} processes cannot each have a layer of a model that has {n_layers}. Start fewer.")
    known = [limit for limit in limits if limit is not None]
    if len(known) < n_ranks:
        alike = 4 * weights_bytes(model.config, model.packed, bytes_of_float(workload, backend))
        known = [alike + reserve_bytes] * n_ranks
    rooms = [limit - reserve_bytes for limit in known]
    placed = _placing(model, workload, rooms, backend)
    most = workload.context or model.config.max_position_embeddings
    context = largest_where(lambda context: placed(context, 1.0) is not None, most)
    if not context:
        weights = weights_bytes(model.config, model.packed, bytes_of_float(workload, backend))
        raise FitError(
            f"The layers do not fit {n_ranks} machines, whatever the context: {weights / 1e9:.1f} GB of weights, and "
            f"{', '.join(f'{room / 1e9:.1f}' for room in rooms)} GB of room. Take fewer bits, or more machines."
        )
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if placed(context, middle) else (middle, high)
    layers = placed(context, high)
    assert layers is not None, "with all of the memory it fits"
    return Split("pipeline", layers)


def _placing(
    model: ModelFolder | ModelShape, workload: Workload, rooms: Sequence[int], backend: Backend
) -> Callable[[int, float], tuple[int, ...] | None]:
    """What tells how many layers each rank gets at a context and with a share of its room; None where some are left."""
    config, n_ranks = model.config, len(rooms)
    n_layers = config.num_hidden_layers
    of_layers = layer_weights_bytes(config, model.packed, bytes_of_float(workload, backend))
    known: dict[int, list[tuple[int, int]]] = {}  # of each rank: bytes besides its layers, and of a layer's cache

    def beside(context: int, rank: int) -> tuple[int, int]:
        """By two plans that differ in a layer, for a plan is linear in them."""
        plans = []
        for n_own in (1, 2):
            sizes = [1] * n_ranks
            sizes[rank], sizes[rank - 1] = n_own, n_layers - n_own - (n_ranks - 2)
            asked = replace(workload, context=context, split=Split("pipeline", tuple(sizes)), rank=rank)
            plan = plan_memory(model, asked, backend=backend)
            layers = asked.split.layers_of(rank)  # type: ignore[union-attr]
            plans.append(plan.peak_bytes - sum(of_layers[layers.start : layers.stop]))
        return 2 * plans[0] - plans[1], plans[1] - plans[0]

    def placed(context: int, share: float) -> tuple[int, ...] | None:
        if n_ranks == n_layers:
            return (1,) * n_ranks
        if context not in known:
            known[context] = [beside(context, rank) for rank in range(n_ranks)]
        sizes, first = [0] * n_ranks, 0
        for rank in reversed(range(n_ranks)):  # the last one has the first layers
            fixed, cache = known[context][rank]
            left = share * rooms[rank] - fixed
            while first < n_layers - rank and left >= of_layers[first] + cache:
                left -= of_layers[first] + cache
                sizes[rank], first = sizes[rank] + 1, first + 1
        return tuple(sizes) if first == n_layers and all(sizes) else None

    return placed
