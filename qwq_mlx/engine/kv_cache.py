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
from qwq_mlx.model.memory.plan import KV_GROUP
from qwq_mlx.model.shared_prefix import MIN_SHARED, padded

__all__ = [
    "Layer",
    "borrowed",
    "empty_cache",
    "filled_cache",
    "fork_cache",
    "forked_cache",
    "grow",
    "layer_of",
    "layers_of",
    "new_cache",
    "take_layers",
    "take_out_of_batch",
]

_NAMES = ("keys", "values")
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
        if each.room == 0 or each.offset + n_ids <= each.room:
            return  # all layers are of one length
        each.make_room(n_ids)


def take_out_of_batch(cache: Sequence[Any]) -> None:
    """Let a row's cache hold its own positions, as copies; in a batch it would keep those of all rows in memory."""
    if cache and (mirror := mirror_of(cache)) is not None:
        mirror.leader.tell("leave", {"key": mirror.key})
    for each in cache:
        if isinstance(each, row_cache_class()):
            each.leave()


def layers_of(cache: Sequence[Any], n_ids: int) -> list[Layer]:
    """`layer_of` each layer."""
    return [layer_of(each, n_ids) for each in cache]


def layer_of(each: Any, n_ids: int) -> Layer:
    """What a layer's cache holds for the first n_ids at most; views, but copies for a row that shares its prefix."""
    n_ids, arrays = min(n_ids, each.offset), {}
    for name in _NAMES:
        parts = _named(name, each.whole(name))
        arrays.update({part: array[..., :n_ids, :] for part, array in parts.items()})
    return Layer(arrays, each.room)


def filled_cache(module: Any, layers: Sequence[Layer], kv_bits: int | None = None) -> list[Any]:
    """A KV cache that holds what `layers_of` gave, with the capacity it had; of this process alone."""
    cache = empty_cache(module, kv_bits)
    for each, layer in zip(cache, layers, strict=True):
        for name in _NAMES:
            parts = [name] if kv_bits is None else list(_named(name, _PARTS))
            each.set_own(name, [padded(layer.arrays[part], layer.capacity) for part in parts])
        each.offset = layer.arrays[parts[0]].shape[2]
    return cache


def forked_cache(module: Any, cache: Sequence[Any], n_ids: int, kv_bits: int | None = None) -> list[Any]:
    """A KV cache that begins as another one does, with n_ids positions at most, which are not copied if they are many;
    of this process alone."""
    n_ids = min(n_ids, cache[0].offset)
    if n_ids < MIN_SHARED:
        return filled_cache(module, layers_of(cache, n_ids), kv_bits)
    forked = empty_cache(module, kv_bits)
    for each, source in zip(forked, cache, strict=True):
        each.prefix, each.offset = source.share(n_ids), n_ids
    return forked


def fork_cache(module: Any, cache: Sequence[Any], n_ids: int, kv_bits: int | None = None) -> list[Any]:
    """`forked_cache` in every process that holds the model."""
    forked, mirror = forked_cache(module, cache, n_ids, kv_bits), mirror_of(cache)
    if mirror is not None:
        leader, n_held = mirror.leader, forked[0].offset
        key = leader.mirror(forked).key
        leader.tell("fork", {"source": mirror.key, "n_ids": n_held, "key": key, "kv_bits": kv_bits})
    return forked


@contextmanager
def borrowed(cache: Sequence[Any], n_ids: int) -> Iterator[None]:
    """Within it the cache holds its first n_ids positions, and may be fed others; afterwards all that it held before.

    Only the positions behind n_ids are copied. A cache that grew meanwhile has its room from before again, because who
    attends over the whole room (a quantized cache) rounds otherwise in a larger one.
    """
    prefixes, offset, mirror = [each.prefix for each in cache], cache[0].offset, mirror_of(cache)
    if mirror is not None:
        mirror.leader.tell("borrow", {"row": [mirror.key, offset], "n_ids": n_ids})
    own_room, start = cache[0].room - cache[0].n_shared, max(0, n_ids - cache[0].n_shared)
    n_own = offset - cache[0].n_shared
    tails = [  # one position of padding makes each a copy
        {name: [padded(part[..., start:n_own, :], n_own - start + 1) for part in each.own(name)] for name in _NAMES}
        for each in cache
    ]
    mx.eval(tails)
    for each in cache:
        each.trim(offset - n_ids)
    try:
        yield
    finally:
        if mirror is not None:
            mirror.leader.tell("give_back")
        for each, tail, prefix in zip(cache, tails, prefixes, strict=True):
            for name in _NAMES:
                both = zip(each.own(name), tail[name], strict=False)  # it had none, but may have got some meanwhile
                each.set_own(name, [_restored(part, before, start, own_room) for part, before in both])
            each.prefix, each.offset = prefix, offset


def _restored(array: mx.array, tail: mx.array, start: int, room: int) -> mx.array:
    """An array with its tail, which ends in one position of padding, from `start` on, and the room from before."""
    n_tail = tail.shape[2] - 1
    if array.shape[2] != room:
        array = padded(array[..., :start, :], room)
    if n_tail:
        array[..., start : start + n_tail, :] = tail[..., :n_tail, :]
    mx.eval(array)
    return array


def take_layers(arrays: dict[str, mx.array], capacities: Sequence[int]) -> Iterator[Layer]:
    """The layers of a saved run (layers.0.keys and so on), each taken out of its arrays when it is asked for, so that
    what was read of it goes with it."""
    for index, capacity in enumerate(capacities):
        start = f"layers.{index}."
        names = [name for name in arrays if name.startswith(start)]
        yield Layer({name.removeprefix(start): arrays.pop(name) for name in names}, capacity)


def _named(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    """The parts of keys or values by their names; one alone has that of both."""
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}.{kind}": part for kind, part in zip(_PARTS, parts, strict=True)}
