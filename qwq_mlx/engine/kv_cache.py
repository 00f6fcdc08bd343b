"""The KV cache of a run: plain or quantized, taken apart for a checkpoint and put together again.

A quantized layer holds keys and values as (codes, scales, biases); everywhere else in the package a layer is a `Layer`,
so that who saves, forks or resumes need not know which kind it is.

Where several processes hold the model, a cache has a mirror: the others do with their parts what is done here.

Does not: decide how many bits are worth it (the caller does; scripts/measure_kv_bits.py says what they cost).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.engine.ranks.leader import leader_of, mirror_of
from qwq_mlx.model.attention import quantized_cache_class
from qwq_mlx.model.batched_cache import row_cache_class
from qwq_mlx.model.memory.activations import n_positions
from qwq_mlx.model.memory.plan import KV_GROUP

__all__ = [
    "Layer",
    "borrowed",
    "copied_cache",
    "empty_cache",
    "filled_cache",
    "grow",
    "layer_arrays",
    "layers_of",
    "new_cache",
    "saved_layers",
    "take_out_of_batch",
]

_PARTS = ("codes", "scales", "biases")


class Layer(NamedTuple):
    """One layer's cache: its arrays (1, heads, positions, width) by name, and the positions it has room for."""

    arrays: Mapping[str, mx.array]
    capacity: int


def new_cache(module: Any, kv_bits: int | None = None) -> list[Any]:
    """An empty KV cache for every layer. kv_bits: 8 or 4 quantize it in groups of 64; None keeps the compute type."""
    cache, leader = empty_cache(module, kv_bits), leader_of(module)
    if leader is not None:
        leader.tell("new", {"key": leader.mirror(cache).key, "kv_bits": kv_bits})
    return cache


def empty_cache(module: Any, kv_bits: int | None = None) -> list[Any]:
    """`new_cache` of this process alone."""
    if kv_bits is None:
        return [row_cache_class()() for _ in module.layers]
    return [quantized_cache_class()(group_size=KV_GROUP, bits=kv_bits) for _ in module.layers]


def grow(cache: Sequence[Any], n_ids: int) -> None:
    """Make room for n_ids more positions, one layer after another.

    Left to mlx_lm's caches, all layers grow within one step's graph, and the old ones live until the device is through
    with it: twice the cache, every 256 ids. Here only one layer is held twice. An empty cache is left to its first use.
    """
    for each in cache:
        needed = each.offset + n_ids
        if each.room == 0 or needed <= each.room:
            return  # all layers are of one length
        for name in ("keys", "values"):
            array_or_parts = getattr(each, name)
            parts = [array_or_parts] if isinstance(array_or_parts, mx.array) else list(array_or_parts)
            grown = [_padded(part[..., : each.offset, :], n_positions(needed)) for part in parts]
            setattr(each, name, grown[0] if isinstance(array_or_parts, mx.array) else tuple(grown))
            mx.eval(grown)


def take_out_of_batch(cache: Sequence[Any]) -> None:
    """Let a row's cache hold its own positions, as copies; in a batch it would keep those of all rows in memory."""
    if cache and (mirror := mirror_of(cache)) is not None:
        mirror.leader.tell("leave", {"key": mirror.key})
    for each in cache:
        if isinstance(each, row_cache_class()):
            each.leave()


def layers_of(cache: Sequence[Any], n_ids: int) -> list[Layer]:
    """What each layer holds for the first n_ids at most; views, not copies."""
    n_ids = min(n_ids, cache[0].offset)
    layers = []
    for each in cache:
        arrays = {}
        for name, array_or_parts in (("keys", each.keys), ("values", each.values)):
            parts = {name: array_or_parts} if isinstance(array_or_parts, mx.array) else _named(name, array_or_parts)
            arrays.update({part: array[..., :n_ids, :] for part, array in parts.items()})
        layers.append(Layer(arrays, next(iter(parts.values())).shape[2]))
    return layers


def filled_cache(module: Any, layers: Sequence[Layer], kv_bits: int | None = None) -> list[Any]:
    """A KV cache that holds what `layers_of` gave, with the capacity it had; of this process alone."""
    cache = empty_cache(module, kv_bits)
    for each, layer in zip(cache, layers, strict=True):
        for name in ("keys", "values"):
            parts = [name] if kv_bits is None else list(_named(name, _PARTS))
            padded = tuple(_padded(layer.arrays[part], layer.capacity) for part in parts)
            setattr(each, name, padded[0] if kv_bits is None else padded)
        each.offset = layer.arrays[parts[0]].shape[2]
    return cache


def copied_cache(module: Any, cache: Sequence[Any], n_ids: int, kv_bits: int | None = None) -> list[Any]:
    """A KV cache of its own that holds the first n_ids positions of another one, as far as that has them."""
    copied, mirror = filled_cache(module, layers_of(cache, n_ids), kv_bits), mirror_of(cache)
    if mirror is not None:
        leader, n_copied = mirror.leader, copied[0].offset
        key = leader.mirror(copied).key
        leader.tell("copy", {"source": mirror.key, "n_ids": n_copied, "key": key, "kv_bits": kv_bits})
    return copied


@contextmanager
def borrowed(cache: Sequence[Any], n_ids: int) -> Iterator[None]:
    """Within it the cache holds its first n_ids positions, and may be fed others; afterwards all that it held before.

    Only the positions behind n_ids are copied. A cache that grew meanwhile has its room from before again, because who
    attends over the whole room (a quantized cache) rounds otherwise in a larger one.
    """
    offset, mirror = cache[0].offset, mirror_of(cache)
    if mirror is not None:
        mirror.leader.tell("borrow", {"row": [mirror.key, offset], "n_ids": n_ids})
    before = layers_of(cache, offset)
    capacity = before[0].capacity
    tails = [
        {name: _padded(array[..., n_ids:, :], offset - n_ids + 1) for name, array in layer.arrays.items()}
        for layer in before
    ]
    del before  # views would keep every layer's arrays twice
    mx.eval(tails)
    for each in cache:
        each.trim(offset - n_ids)
    try:
        yield
    finally:
        if mirror is not None:
            mirror.leader.tell("give_back")
        for each, tail in zip(cache, tails, strict=True):
            for name in ("keys", "values"):
                array_or_parts = getattr(each, name)
                is_plain = isinstance(array_or_parts, mx.array)
                parts = {name: array_or_parts} if is_plain else _named(name, array_or_parts)
                restored = [_restored(array, tail[part], n_ids, capacity) for part, array in parts.items()]
                setattr(each, name, restored[0] if is_plain else tuple(restored))
                mx.eval(restored)
            each.offset = offset


def _restored(array: mx.array, tail: mx.array, n_ids: int, capacity: int) -> mx.array:
    """An array with its tail, which ends in one position of padding, from n_ids on, and the room from before."""
    n_tail = tail.shape[2] - 1
    if array.shape[2] != capacity:
        array = _padded(array[..., : min(array.shape[2], n_ids), :], capacity)
    if n_tail:
        array[..., n_ids : n_ids + n_tail, :] = tail[..., :n_tail, :]
    return array


def layer_arrays(layers: Sequence[Layer]) -> dict[str, mx.array]:
    """The arrays of some layers under the names that a saved run has: layers.0.keys and so on."""
    return {
        f"layers.{place}.{name}": array for place, layer in enumerate(layers) for name, array in layer.arrays.items()
    }


def saved_layers(arrays: Mapping[str, mx.array], capacities: Sequence[int]) -> list[Layer]:
    """The layers of a saved run, whose arrays `layer_arrays` named."""
    layers = []
    for index, capacity in enumerate(capacities):
        start = f"layers.{index}."
        own = {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
        layers.append(Layer(own, capacity))
    return layers


def _named(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}.{kind}": part for kind, part in zip(_PARTS, parts, strict=True)}


def _padded(array: mx.array, capacity: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)])
