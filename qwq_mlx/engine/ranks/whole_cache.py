"""The KV cache of a run that is saved or resumed, whole in one process, whoever holds the model.

Does not: write or read files (`generate.checkpoint` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwq_mlx.engine.kv_cache import Layer, filled_cache, layers_of
from qwq_mlx.engine.ranks.cache_parts import Form, gathered_layers, scattered_layers
from qwq_mlx.engine.ranks.leader import leader_of, mirror_of
from qwq_mlx.model.load import LoadedModel

__all__ = ["cache_of_whole", "whole_layers"]


def whole_layers(model: LoadedModel, cache: Sequence[Any], n_ids: int) -> list[Layer]:
    """What each layer holds for the first n_ids at most, with the heads of all ranks; views where there is one."""
    mirror = mirror_of(cache)
    own = layers_of(cache, n_ids)
    if mirror is None:
        return own
    offset = int(cache[0].offset)
    n_kept = min(n_ids, offset)
    n_heads = model.config.num_key_value_heads
    forms: list[Form] = [
        (name, (1, n_heads, *array.shape[2:]), str(array.dtype).removeprefix("mlx.core."))
        for name, array in own[0].arrays.items()
    ]
    with mirror.leader.in_step():
        mirror.leader.tell("gather", {"row": [mirror.key, offset], "n_ids": n_kept, "arrays": forms})
        return gathered_layers(model.module, cache, n_kept, forms)


def cache_of_whole(model: LoadedModel, layers: Sequence[Layer], kv_bits: int | None) -> list[Any] | None:
    """A KV cache that holds what `whole_layers` gave; None for no layers."""
    if not layers:
        return None
    leader = leader_of(model.module)
    if leader is None:
        return filled_cache(model.module, layers, kv_bits)
    forms: list[Form] = [
        (name, tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))
        for name, array in layers[0].arrays.items()
    ]
    key, capacity = leader.next_key(), layers[0].capacity
    with leader.in_step():
        leader.tell("scatter", {"key": key, "capacity": capacity, "kv_bits": kv_bits, "arrays": forms})
        cache = filled_cache(model.module, scattered_layers(model.module, layers, forms), kv_bits)
    leader.mirror(cache, key)
    return cache
