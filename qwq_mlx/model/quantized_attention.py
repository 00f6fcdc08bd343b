"""Attention over a quantized KV cache: no matrix of codes is ever sliced or broadcast.

mlx_lm hands out the filled part of such a cache, a slice with gaps between the heads, and broadcasts it over the query
heads that share a key head. With MLX 0.32.4 on CUDA the one has no quantized_matmul ("No implementation for problem
shape") and the other gives wrong numbers without a word; on the CPU it is copied for every query head. Here attention
reads all of the room, a mask leaves out what is not filled, and the query heads of a key head are rows of one product.

A cache in the compute type goes through mlx_lm's own attention, unchanged. On CUDA the first pass and the first step
with a quantized cache compile their kernels, 50 to 100 s on an H100; heads of a single group, 64 wide, are refused
there (`memory.can_quantize`), for MLX 0.32.4 multiplies by those wrongly whatever their layout.

Does not: decide when to quantize (`generate.fitting` does), or keep a cache on disk (`generate.cache`).
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["attention_class", "quantized_cache_class"]


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


@functools.cache
def attention_class() -> type[Any]:
    """mlx_lm's attention of a Qwen2 layer, but for a `quantized_cache_class()`, which it reads whole."""
    home = import_mlx_lm("mlx_lm.models.qwen2")
    whole = quantized_cache_class()

    class Attention(home.Attention):  # type: ignore[misc, name-defined]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
            if not isinstance(cache, whole):
                return super().__call__(x, mask, cache)
            if mask is None:
                mask = cache.make_mask(x.shape[1])
            queries, keys, values = (
                projected.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)
                for projected, n_heads in (
                    (self.q_proj(x), self.n_heads),
                    (self.k_proj(x), self.n_kv_heads),
                    (self.v_proj(x), self.n_kv_heads),
                )
            )
            queries = self.rope(queries, offset=cache.offset) * self.scale
            cache.update_and_fetch(self.rope(keys, offset=cache.offset), values)
            mixed = _attend(queries, cache, mask)
            return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

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
