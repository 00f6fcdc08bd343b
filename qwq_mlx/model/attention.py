"""Attention over several rows, each with a cache of its own, and over a quantized KV cache.

Rows share the projections; each attends to its own cache, in a batch of rows of about its length, or in place, as
`row_caches` says, and rows may enter and leave at any step. No matrix of codes is ever sliced or broadcast:

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

from qwq_mlx.model.batched_cache import BatchedLayer, Writing
from qwq_mlx.model.kernels.decode_attention import decode_attention
from qwq_mlx.model.many_rows import attend_rows
from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.row_caches import InPlaceRows, RowCaches, SeveralEach, in_order
from qwq_mlx.model.shared_prefix import SharesPrefix, attend_behind
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["attention_class", "quantized_cache_class"]


@functools.cache
def quantized_cache_class() -> type[Any]:
    """mlx_lm's QuantizedKVCache(group_size, bits), whose attention reads all of its room.

    keys and values stay codes, scales and biases, (1, heads, room, width) each, of whose positions the first `offset`
    are filled; behind a shared prefix they are its own (`shared_prefix`).
    """
    home = import_mlx_lm("mlx_lm.models.cache")

    class WholeQuantizedCache(SharesPrefix, home.QuantizedKVCache):  # type: ignore[misc, name-defined]
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
            """Append positions; attention reads `whole`."""
            if self.prefix is None:
                super().update_and_fetch(keys, values)
                return
            packing: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
            self.append(mx.quantize(keys, **packing), mx.quantize(values, **packing))

        def make_mask(self, n_ids: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
            """(n_ids, room after them), true where an id of the next n_ids may look."""
            room = self.room
            if self.offset + n_ids > room:  # as update_and_fetch will grow it, where nobody made room before
                room = (self.offset if self.offset % CACHE_STEP else room) + n_positions(n_ids)
            return mx.arange(room) <= mx.arange(self.offset, self.offset + n_ids)[:, None]

    return WholeQuantizedCache


@functools.cache
def attention_class() -> type[Any]:
    """mlx_lm's attention of a Qwen2 layer, also over a `quantized_cache_class()`, read whole, and over `RowCaches`."""
    home = import_mlx_lm("mlx_lm.models.qwen2")

    class Attention(home.Attention):  # type: ignore[misc, name-defined]
        def projections(self, x: mx.array) -> Sequence[mx.array]:
            """Queries, keys and values side by side: (rows, n_ids, heads * width) each."""
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

        def attend(
            self, projected: Sequence[mx.array], mask: Any = None, cache: Any = None, arrived: mx.array | None = None
        ) -> mx.array:
            """What the output projection takes of `projections`: (rows, n_ids, heads * width).

            arrived: as `decode_attention` takes it.
            """
            shape = projected[0].shape[:2]
            if isinstance(cache, InPlaceRows):
                mixed = _in_place(projected, cache, arrived)
                if cache.others is not None:
                    others = self.attend([each[cache.others.taken] for each in projected], None, cache.others.cache)
                    mixed.append(others)
                return in_order(mixed, cache.order).reshape(*shape, -1)
            queries, keys, values = (
                each.reshape(*shape, n_heads, -1).transpose(0, 2, 1, 3)
                for each, n_heads in zip(projected, (self.n_heads, self.n_kv_heads, self.n_kv_heads), strict=True)
            )
            offset = 0 if cache is None else cache.offset
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
            return self.mix(queries, keys, values, mask, cache).transpose(0, 2, 1, 3).reshape(*shape, -1)

        def mix(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> mx.array:
            """The values that each id attends to, (rows, heads, n_ids, width); queries and keys are rotated."""
            if isinstance(cache, RowCaches):
                return _rows(queries, keys, values, cache, self.scale)
            if cache is None:
                return _over_floats(queries, keys, values, None, self.scale, mask)
            return _row(queries, keys, values, cache, self.scale, mask)

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
            return self.o_proj(self.attend(self.projections(x), mask, cache))

    return Attention


def _in_place(projected: Sequence[mx.array], rows: InPlaceRows, arrived: mx.array | None) -> list[mx.array]:
    """The attention of each group's ids, (ids, 1, heads * width); their keys and values are then in the caches.

    projected: queries, keys and values of all ids, (ids, 1, heads * width) each, not rotated.
    """
    mixed = [
        decode_attention(projected, rows.rotation, group.at, group.batch.whole(), arrived) for group in rows.groups
    ]
    rows.advance()
    return mixed


def _rows(queries: mx.array, keys: mx.array, values: mx.array, rows: RowCaches, scale: float) -> mx.array:
    """The attention of all rows of a pass behind rotary embedding, (ids, heads, 1, width)."""
    mixed = []
    for cache, places, taken, writing, several in rows.groups:
        if several is not None and writing is not None:
            mixed.append(_batch_of_several(queries, keys, values, cache, writing, several, scale))
            continue
        query, key, value = (each[taken] for each in (queries, keys, values))
        if writing is not None:
            key, value = cache.append(key, value, writing)
            mixed.append(_over_batch(query, key, value, cache, scale, writing))
        elif len(places) == 1:
            mixed.append(_begun(_row(query, key, value, cache, scale), cache))
        else:
            query, key, value = (each.transpose(2, 1, 0, 3) for each in (query, key, value))  # (1, heads, n_fed, width)
            if rows.is_exact:
                row = _one_by_one(query, key, value, cache, scale)
            else:
                row = _row(query, key, value, cache, scale, "causal")
            mixed.append(_begun(row.transpose(2, 1, 0, 3), cache))
    return in_order(mixed, rows.order)


def _begun(mixed: mx.array, cache: Any) -> mx.array:
    """Attention of one row, on the CPU under way where the row shares its prefix: else MLX copies that for all rows at
    once, and holds all of the copies."""
    if isinstance(cache, SharesPrefix) and cache.prefix is not None and mx.default_device().type == mx.cpu:
        mx.async_eval(mixed)  # type: ignore[no-untyped-call]
    return mixed


def _batch_of_several(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    batch: BatchedLayer,
    writing: Writing,
    several: SeveralEach,
    scale: float,
) -> mx.array:
    """The attention of a batch in which rows feed several ids, (its ids, heads, 1, width)."""

    def by_row(array: mx.array) -> mx.array:  # (rows, heads, n, width)
        return array[several.fed].reshape(-1, several.n, array.shape[1], array.shape[3]).transpose(0, 2, 1, 3)

    query, key, value = (by_row(each) for each in (queries, keys, values))
    key, value = batch.append(key, value, writing)
    mixed = _over_batch(query, key, value, batch, scale, writing)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(-1, mixed.shape[1], 1, mixed.shape[3])
    return mixed if several.picked is None else mixed[several.picked]


def _row(queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any = None) -> mx.array:
    """One row's attention over its own cache: (1, heads, n_ids, width)."""
    if isinstance(cache, quantized_cache_class()):
        mask = mask if isinstance(mask, mx.array) else cache.make_mask(queries.shape[2])
        cache.update_and_fetch(keys, values)
        return _attend(queries * scale, cache, mask)
    keys, values = cache.update_and_fetch(keys, values)
    return _over_floats(queries, keys, values, cache, scale, mask)


def _one_by_one(queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float) -> mx.array:
    """The same with the bits that passes of one id give."""
    before, n_ids = cache.offset, queries.shape[2]
    fetched = cache.update_and_fetch(keys, values)
    mixed = []
    for place in range(n_ids):
        query, n_seen = queries[:, :, place : place + 1], before + place + 1
        if isinstance(cache, quantized_cache_class()):
            mask = mx.arange(cache.room) < n_seen
            mixed.append(_begun(_attend(query * scale, cache, mask[None]), cache))
        else:
            keys, values = (each[..., :n_seen, :] for each in fetched)
            mixed.append(_over_floats(query, keys, values, cache, scale, None))
    return mx.concatenate(mixed, axis=2)


def _over_floats(queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any) -> mx.array:
    mixed: mx.array = _base().scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)
    return mixed


def _over_batch(
    queries: mx.array, keys: mx.array, values: mx.array, batch: BatchedLayer, scale: float, writing: Writing
) -> mx.array:
    """keys, values: of a batch, behind what its rows share, with the room of all."""
    if batch.prefix is None and queries.dtype == mx.float32 and mx.default_device().type == mx.cpu:
        return attend_rows(queries, keys, values, writing.mask, scale, n_seen=writing.n_seen)
    keys, values = keys[:, :, : writing.n_seen], values[:, :, : writing.n_seen]
    if batch.prefix is None:
        return _over_floats(queries, keys, values, None, scale, writing.mask)
    return attend_behind(batch.prefix, queries, keys, values, scale, writing.mask)


@functools.cache
def _base() -> Any:
    return import_mlx_lm("mlx_lm.models.base")


def _attend(queries: mx.array, cache: Any, mask: mx.array) -> mx.array:
    """(1, heads, n_ids, width) of scaled queries against all of a cache's room; mask: (n_ids, room)."""
    codes, scales, biases = cache.whole("keys")
    n_kv_heads, room = codes.shape[1:3]
    packing: dict[str, Any] = {"group_size": cache.group_size, "bits": cache.bits}
    # (1, key heads, rows, width): the query heads of a key head, one after another
    rows = queries.reshape(queries.shape[0], n_kv_heads, -1, queries.shape[-1])
    scores = mx.quantized_matmul(rows, codes, scales, biases, transpose=True, **packing)
    scores = scores.reshape(*queries.shape[:3], room)
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(*rows.shape[:3], room)
    codes, scales, biases = cache.whole("values")
    mixed = mx.quantized_matmul(weights, codes, scales, biases, transpose=False, **packing)
    return mixed.reshape(queries.shape)
