"""A whole KV cache from the parts that ranks have, for a saved run, and the parts of a whole one, to go on with it.

Each rank puts its heads, or its layers, into zeros of the whole size, and the sum over ranks is the whole: exact, and
the same for any split. An array at a time: no rank holds more of the whole than one layer.

Does not: write files (`generate.checkpoint` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.kv_cache import Layer, layer_of
from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.model.ranks import Ranks, ranks_of

__all__ = ["Form", "gathered_arrays", "received_layers", "scattered_layers", "send_parts"]

Form = tuple[str, tuple[int, ...], str]
"""Name, whole shape (1, heads, positions, width) and type of an array that each layer has."""


def gathered_arrays(module: Any, cache: Sequence[Any], n_ids: int, forms: Sequence[Form]) -> Iterator[mx.array]:
    """The arrays of each layer, whole, for the first n_ids positions; on rank 0, while the others `send_parts`."""
    ranks = _ranks(module)
    for place in range(ranks.n_layers):
        own = layer_of(cache[place - ranks.layers.start], n_ids) if place in ranks.layers else None
        for form in forms:
            yield _sum(_with_part(ranks, own, form), ranks.group)


def send_parts(module: Any, cache: Sequence[Any], n_ids: int, forms: Sequence[Form]) -> None:
    """Give rank 0 what this rank has."""
    for _ in gathered_arrays(module, cache, n_ids, forms):
        pass


def scattered_layers(module: Any, layers: Iterable[Layer], forms: Sequence[Form]) -> list[Layer]:
    """Rank 0's part of whole layers, while the others take theirs by `received_layers`; each is asked for once."""
    ranks, parts = _ranks(module), []
    for place, layer in enumerate(layers):
        arrays = _taken(ranks, place, {name: layer.arrays[name] for name, _, _ in forms})
        if arrays is not None:
            parts.append(Layer(arrays, layer.capacity))
    return parts


def received_layers(module: Any, forms: Sequence[Form], capacity: int) -> list[Layer]:
    """This rank's part of layers that rank 0 has whole."""
    ranks = _ranks(module)
    parts = []
    for place in range(ranks.n_layers):
        parts.append(_taken(ranks, place, {name: mx.zeros(shape, _type(kind)) for name, shape, kind in forms}))
    return [Layer(arrays, capacity) for arrays in parts if arrays is not None]


def _ranks(module: Any) -> Ranks:
    ranks = ranks_of(module)
    assert ranks is not None, "several processes hold the model"
    return ranks


def _type(name: str) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def _with_part(ranks: Ranks, own: Layer | None, form: Form) -> mx.array:
    """Zeros of the whole size, with this rank's part where it has one."""
    name, shape, kind = form
    whole = mx.zeros(shape, _type(kind))
    if own is not None:
        whole[:, ranks.kv_heads.start : ranks.kv_heads.stop] = own.arrays[name]
    return whole


def _taken(ranks: Ranks, place: int, arrays: Mapping[str, mx.array]) -> dict[str, mx.array] | None:
    """This rank's part of a layer that rank 0 gives; None of a layer that it does not have."""
    parts = {}
    for name, array in arrays.items():
        own = _sum(array, ranks.group)[:, ranks.kv_heads.start : ranks.kv_heads.stop]
        parts[name] = mx.contiguous(own)
        mx.eval(parts[name])  # a view would keep all heads
    return parts if place in ranks.layers else None


def _sum(array: mx.array, group: Any) -> mx.array:
    total: mx.array = mx.distributed.all_sum(array, group=group)
    with activity.waiting():
        mx.eval(total)
    return total
