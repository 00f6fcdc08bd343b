"""The KV cache of a run that is saved or resumed, whole, whoever holds the model, an array at a time.

Does not: write or read files (`generate.checkpoint` does).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.engine.kv_cache import Layer, filled_cache, layer_of
from qwq_mlx.engine.ranks.cache_parts import Form, gathered_arrays, scattered_layers
from qwq_mlx.engine.ranks.leader import Mirror, leader_of, mirror_of
from qwq_mlx.model.load import LoadedModel

__all__ = ["NO_CACHE", "WholeCache", "cache_of_whole", "type_name", "whole_cache"]


class WholeCache(NamedTuple):
    """What a KV cache holds, with the heads and layers of all ranks.

    capacities: positions that each layer has room for. forms: of the arrays, named as in a saved run (layers.0.keys).
    arrays: in that order, each made when it is asked for, so that one is in memory beside the cache; close it where not
    all are wanted.
    """

    capacities: tuple[int, ...]
    forms: Sequence[Form]
    arrays: Generator[mx.array, None, None]


def whole_cache(model: LoadedModel, cache: Sequence[Any], n_ids: int) -> WholeCache:
    """The first n_ids positions of a cache, or all; the cache must not change before the arrays are read.

    cache: [] gives no layers.
    """
    if not cache:
        return NO_CACHE
    n_kept = min(n_ids, int(cache[0].offset))
    first, mirror = layer_of(cache[0], n_kept), mirror_of(cache)
    n_heads, n_layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    forms = [(name, (1, n_heads, *array.shape[2:]), type_name(array)) for name, array in first.arrays.items()]
    named = [(f"layers.{place}.{name}", shape, kind) for place in range(n_layers) for name, shape, kind in forms]
    arrays = _own(cache, n_kept) if mirror is None else _gathered(mirror, model, cache, n_kept, forms)
    return WholeCache((first.capacity,) * n_layers, named, arrays)


def _own(cache: Sequence[Any], n_ids: int) -> Generator[mx.array, None, None]:
    for each in cache:
        yield from layer_of(each, n_ids).arrays.values()


def _gathered(
    mirror: Mirror, model: LoadedModel, cache: Sequence[Any], n_ids: int, forms: Sequence[Form]
) -> Generator[mx.array, None, None]:
    leader, offset = mirror.leader, int(cache[0].offset)
    arrays = gathered_arrays(model.module, cache, n_ids, forms)
    leader.tell("gather", {"row": [mirror.key, offset], "n_ids": n_ids, "arrays": forms})
    try:
        for _ in range(model.config.num_hidden_layers * len(forms)):
            with leader.in_step():
                array = next(arrays)
            yield array
    finally:
        with leader.in_step():  # the others give all that they were asked for, also where the disk is full
            for _ in arrays:
                pass


NO_CACHE = WholeCache((), (), _own((), 0))
"""Of a run that is saved without one."""


def cache_of_whole(model: LoadedModel, layers: Iterable[Layer], kv_bits: int | None) -> list[Any] | None:
    """A KV cache that holds whole layers, each of which is asked for once; None for no layers."""
    rest = iter(layers)
    first = next(rest, None)
    if first is None:
        return None
    leader = leader_of(model.module)
    if leader is None:
        return filled_cache(model.module, [first, *rest], kv_bits)
    forms: list[Form] = [(name, tuple(array.shape), type_name(array)) for name, array in first.arrays.items()]
    key, capacity, whole = leader.next_key(), first.capacity, _each([first], rest)
    del first
    with leader.in_step():
        leader.tell("scatter", {"key": key, "capacity": capacity, "kv_bits": kv_bits, "arrays": forms})
        cache = filled_cache(model.module, scattered_layers(model.module, whole, forms), kv_bits)
    leader.mirror(cache, key)
    return cache


def _each(first: list[Layer], rest: Iterable[Layer]) -> Iterator[Layer]:
    yield first.pop()  # itertools.chain would keep it
    yield from rest


def type_name(array: mx.array) -> str:
    """As saved runs name it: "bfloat16" and so on."""
    return str(array.dtype).removeprefix("mlx.core.")
