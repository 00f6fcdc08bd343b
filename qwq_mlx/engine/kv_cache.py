"""The KV cache of a run: plain or quantized, taken apart for a checkpoint and put together again.

A quantized layer holds keys and values as (codes, scales, biases); everywhere else in the package a layer is a `Layer`,
so that who saves, forks or resumes need not know which kind it is.

Does not: decide how many bits are worth it (the caller does; scripts/measure_kv_bits.py says what they cost).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.attention import quantized_cache_class
from qwq_mlx.model.memory.activations import n_positions
from qwq_mlx.model.memory.plan import KV_GROUP
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["Layer", "filled_cache", "grow", "layer_arrays", "layers_of", "new_cache", "saved_layers"]

_PARTS = ("codes", "scales", "biases")


class Layer(NamedTuple):
    """One layer's cache: its arrays (1, heads, positions, width) by name, and the positions it has room for."""

    arrays: Mapping[str, mx.array]
    capacity: int


def new_cache(module: Any, kv_bits: int | None = None) -> list[Any]:
    """An empty KV cache for every layer. kv_bits: 8 or 4 quantize it in groups of 64; None keeps the compute type."""
    home = import_mlx_lm("mlx_lm.models.cache")
    cache: list[Any] = home.make_prompt_cache(module)
    if kv_bits is None:
        return cache
    return [quantized_cache_class()(group_size=KV_GROUP, bits=kv_bits) for _ in cache]


def grow(cache: Sequence[Any], n_ids: int) -> None:
    """Make room for n_ids more positions, one layer after another.

    Left to mlx_lm's caches, all layers grow within one step's graph, and the old ones live until the device is through
    with it: twice the cache, every 256 ids. Here only one layer is held twice. An empty cache is left to its first use.
    """
    for each in cache:
        if each.keys is None:
            return
        needed = each.offset + n_ids
        for name in ("keys", "values"):
            array_or_parts = getattr(each, name)
            parts = [array_or_parts] if isinstance(array_or_parts, mx.array) else list(array_or_parts)
            if needed <= parts[0].shape[2]:
                return  # all layers are of one length
            grown = [_padded(part[..., : each.offset, :], n_positions(needed)) for part in parts]
            setattr(each, name, grown[0] if isinstance(array_or_parts, mx.array) else tuple(grown))
            mx.eval(grown)


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
    """A KV cache that holds what `layers_of` gave, with the capacity it had."""
    cache = new_cache(module, kv_bits)
    for each, layer in zip(cache, layers, strict=True):
        for name in ("keys", "values"):
            parts = [name] if kv_bits is None else list(_named(name, _PARTS))
            padded = tuple(_padded(layer.arrays[part], layer.capacity) for part in parts)
            setattr(each, name, padded[0] if kv_bits is None else padded)
        each.offset = layer.arrays[parts[0]].shape[2]
    return cache


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
