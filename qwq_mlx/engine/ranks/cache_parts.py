"""A whole KV cache from the parts that ranks have, for a saved run, and the parts of a whole one, to go on with it.

Each rank puts its heads, or its layers, into zeros of the whole size, and the sum over ranks is the whole: exact, and
the same for any split. Rank 0 holds all layers whole while the file is written or read, every other rank one array.

Does not: write files (`generate.checkpoint` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.kv_cache import Layer, layers_of
from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.model.ranks import Ranks, ranks_of

__all__ = ["Form", "gathered_layers", "received_layers", "scattered_layers", "send_parts"]

Form = tuple[str, tuple[int, ...], str]
"""Name, whole shape (1, heads, positions, width) and type of an array that each layer has."""


def gathered_layers(module: Any, cache: Sequence[Any], n_ids: int, forms: Sequence[Form]) -> list[Layer]:
    """The whole of each layer for the first n_ids positions; on rank 0, while the others `send_parts`."""
    own = layers_of(cache, n_ids)
    capacity = own[0].capacity
    return [Layer(arrays, capacity) for arrays in _summed(module, own, forms)]


def send_parts(module: Any, cache: Sequence[Any], n_ids: int, forms: Sequence[Form]) -> None:
    """Give rank 0 what this rank has."""
    for _ in _summed(module, layers_of(cache, n_ids), forms):
        pass


def scattered_layers(module: Any, layers: Sequence[Layer], forms: Sequence[Form]) -> list[Layer]:
    """Rank 0's part of whole layers, while the others take theirs by `received_layers`."""
    ranks = _ranks(module)
    ordered = [{name: layer.arrays[name] for name, _, _ in forms} for layer in layers]
    parts = [_taken(ranks, place, arrays) for place, arrays in enumerate(ordered)]
    return [Layer(arrays, layers[0].capacity) for arrays in parts if arrays is not None]


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


def _summed(module: Any, own: Sequence[Layer], forms: Sequence[Form]) -> Any:
    """The arrays of every layer of the model, whole."""
    ranks = _ranks(module)
    for place in range(ranks.n_layers):
        arrays: dict[str, mx.array] = {}
        for name, shape, kind in forms:
            whole = mx.zeros(shape, _type(kind))
            if place in ranks.layers:
                part = own[place - ranks.layers.start].arrays[name]
                whole[:, ranks.kv_heads.start : ranks.kv_heads.stop] = part
            arrays[name] = _sum(whole, ranks.group)
        yield arrays


def _taken(ranks: Ranks, place: int, arrays: Mapping[str, mx.array]) -> dict[str, mx.array] | None:
    """This rank's part of a layer that rank 0 gives; None of a layer that it does not have."""
    parts = {}
    for name, array in arrays.items():
        whole = _sum(array, ranks.group)
        parts[name] = mx.contiguous(whole[:, ranks.kv_heads.start : ranks.kv_heads.stop])
        mx.eval(parts[name])  # a view would keep all heads
    return parts if place in ranks.layers else None


def _sum(array: mx.array, group: Any) -> mx.array:
    total: mx.array = mx.distributed.all_sum(array, group=group)
    with activity.waiting():
        mx.eval(total)
    return total
