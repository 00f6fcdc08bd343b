"""Attention over several rows, each with a cache of its own, and over a quantized KV cache.

Rows share the projections; each attends to its own cache, so no row is padded to another's length and rows may enter
and leave at any step. No matrix of codes is ever sliced or broadcast:

mlx_lm hands out the filled part of such a cache, a slice with gaps between the heads, and broadcasts it over the query
heads that share a key head. With MLX 0.32.4 on CUDA the one has no quantized_matmul ("No implementation for problem
shape") and the other gives wrong numbers without a word; on the CPU it is copied for every query head. Here attention
reads all of the room, a mask leaves out what is not filled, and the query heads of a key head are rows of one product.

A cache in the compute type goes through mlx_lm's own attention, unchanged. On CUDA the first pass and the first step
with a quantized cache compile their kernels, 50 to 100 s on an H100; heads of a single group, 64 wide, are refused
there (`memory.can_quantize`), for MLX 0.32.4 multiplies by those wrongly whatever their layout.

Does not: decide when to quantize (`memory.fit` does), or keep a cache on disk (`engine.kv_cache`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["RowCaches", "attention_class", "joined", "quantized_cache_class"]


@functools.cache
def quantized_cache_class() -> type[Any]:
    """mlx_lm's QuantizedKVCache(group_size, bits), whose attention reads all of its room.

    keys and values stay tuples of codes, scales and biases, (1, heads, room, width) each, of whose positions the first
    `offset` are filled.
    """
    home = import_mlx_lm("mlx_lm.models.cache")

    class WholeQuantizedCache(home.QuantizedKVCache):  # type: ignore[misc, name-defined]
        def make_mask(self, n_ids: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
            """(n_ids, room after them), true where an id of the next n_ids may look."""
            room = 0 if self.keys is None else self.keys[0].shape[2]
            if self.offset + n_ids > room:  # as update_and_fetch will grow it, where nobody made room before
                room = (self.offset if self.offset % CACHE_STEP else room) + n_positions(n_ids)
            return mx.arange(room) <= mx.arange(self.offset, self.offset + n_ids)[:, None]

    return WholeQuantizedCache


class RowCaches:
    """One layer's caches of the rows of a pass, each with its own length. Each row feeds one id.

    offset: (rows,) positions that each holds, the same in every layer.
    """

    def __init__(self, caches: Sequence[Any], offset: mx.array) -> None:
        self.caches = tuple(caches)
        self.offset = offset

    def make_mask(self, n_ids: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: the one id of a row may look at all that its cache holds."""


def joined(caches: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The KV caches of some rows as one for their pass, by layer; that of a single row as it is."""
    if len(caches) == 1:
        return caches[0]
    offset = mx.array([row[0].offset for row in caches])
    return [RowCaches(layer, offset) for layer in zip(*caches, strict=True)]


@functools.cache
def attention_class() -> type[Any]:
    """mlx_lm's attention of a Qwen2 layer, also over a `quantized_cache_class()`, read whole, and over `RowCaches`."""
    home = import_mlx_lm("mlx_lm.models.qwen2")
    base = import_mlx_lm("mlx_lm.models.base")
    whole = quantized_cache_class()

    class Attention(home.Attention):  # type: ignore[misc, name-defined]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
            if not isinstance(cache, (whole, RowCaches)):
                return super().__call__(x, mask, cache)
            queries, keys, values = (
                projected.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)
                for projected, n_heads in (
                    (self.q_proj(x), self.n_heads),
                    (self.k_proj(x), self.n_kv_heads),
                    (self.v_proj(x), self.n_kv_heads),
                )
            )
            queries, keys = self.rope(queries, offset=cache.offset), self.rope(keys, offset=cache.offset)
            caches = cache.caches if isinstance(cache, RowCaches) else (cache,)
            mixed = [
                self._row(queries[row : row + 1], keys[row : row + 1], values[row : row + 1], mask, own)
                for row, own in enumerate(caches)
            ]
            return self.o_proj(mx.concatenate(mixed).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

        def _row(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> Any:
            """One row's attention over its own cache, behind rotary embedding: (1, heads, n_ids, width)."""
            if isinstance(cache, whole):
                mask = cache.make_mask(queries.shape[2]) if mask is None else mask
                cache.update_and_fetch(keys, values)
                return _attend(queries * self.scale, cache, mask)
            keys, values = cache.update_and_fetch(keys, values)
            return base.scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)

    return Attention


def _attend(queries: mx.array, cache: Any, mask: mx.array) -> mx.array:
    """(1, heads, n_ids, width) of scaled queries against all of a cache's room; mask: (n_ids, room)."""
    n_kv_heads, room = cache.keys[0].shape[1:3]
    packing: dict[str, Any] = {"group_size": cache.group_size, "bits": cache.bits}
    # (1, key heads, rows, width): the query heads of a key head, one after another
    rows = queries.reshape(queries.shape[0], n_kv_heads, -1, queries.shape[-1])
    codes, scales, biases = cache.keys
    scores = mx.quantized_matmul(rows, codes, scales, biases, transpose=True, **packing)
    scores = scores.reshape(*queries.shape[:3], room)
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(*rows.shape[:3], room)
    codes, scales, biases = cache.values
    mixed = mx.quantized_matmul(weights, codes, scales, biases, transpose=False, **packing)
    return mixed.reshape(queries.shape)
