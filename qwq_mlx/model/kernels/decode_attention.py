"""Attention of a pass in which rows feed a few ids each, on CUDA: rotates, writes into the KV cache, attends.

MLX 0.32.4 takes six launches and more a layer for that, and others for each row of a length of its own. Here it is one
for all ids of a batch, whatever their rows' lengths. An id's bits depend on its row alone: not on the ids beside it,
nor on how many ids of its row are fed at once, nor on the room of the cache.

The kernel writes into the arrays of the cache, behind what is held there; nothing that MLX computes is ever written to
these positions while it is read. So nobody may keep a view of a row's positions from behind its offset, and who gives
rows a common beginning copies it (`shared_prefix`).

Does not: read a prompt, or quantized caches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.kernels.device import cuda_kernel

__all__ = ["CacheArrays", "Rotation", "attends_in_place", "decode_attention"]

_WIDTHS = (64, 128)
_MAX_GROUP = 8  # query heads of a key head: what a thread's registers hold
_WARPS = 4
_MIN_CHUNK = 128  # positions
_MAX_CHUNKS = 32  # of an id, 0.5 kB a head: 21 MB for 32 ids of 40 heads and 4,096 positions


class CacheArrays(NamedTuple):
    """keys, values: (rows, key heads, room, width) bfloat16, written to. shared: what all rows begin with,
    (1, key heads, positions, width) each; None for nothing."""

    keys: mx.array
    values: mx.array
    shared: tuple[mx.array, mx.array] | None = None


class Rotation(NamedTuple):
    """cosines, sines: (ids, width) float32, the first half of the sines negative."""

    cosines: mx.array
    sines: mx.array


def attends_in_place(n_heads: int, n_kv_heads: int, width: int) -> bool:
    """Whether the kernels are made for heads of these numbers and this width.

    >>> attends_in_place(40, 8, 128), attends_in_place(16, 1, 128)
    (True, False)
    """
    # of a single key head MLX's slices are contiguous: a copy of the cache might be none
    return width in _WIDTHS and n_kv_heads > 1 and n_heads % n_kv_heads == 0 and n_heads // n_kv_heads <= _MAX_GROUP


def decode_attention(
    projected: Sequence[mx.array],
    rotation: Rotation,
    at: mx.array,
    cache: CacheArrays,
    arrived: mx.array | None = None,
) -> mx.array:
    """What ids of a pass attend to, (n, 1, heads * width) bfloat16; their keys and values are then in the cache.

    projected: queries, keys and values of all ids of the pass, (..., heads * width) bfloat16, not rotated.
    at: (n, 4) int32: an id's row in the cache, its place in the pass, the place of its row's first id, and positions
    that the row holds before the pass, the shared ones too. A row's ids are one after another; it has room for them.
    """
    queries, keys, values = projected
    n_ids, n_kv_heads, width = len(at), cache.keys.shape[1], cache.keys.shape[3]
    n_heads = queries.shape[-1] // width
    group = n_heads // n_kv_heads
    shared = cache.shared or (cache.keys, cache.values)  # not read where nothing is shared
    n_positions = cache.keys.shape[2] + (0 if cache.shared is None else cache.shared[0].shape[2])
    n_chunks = min(_MAX_CHUNKS, -(-n_positions // _MIN_CHUNK))
    counted = mx.zeros(keys.size // width, mx.uint32) if arrived is None else arrived
    mixed, *_ = _kernel()(
        inputs=[queries, keys, values, *rotation, at, cache.keys, cache.values, *shared, counted],
        template=[
            ("WIDTH", width),
            ("GROUP", group),
            ("KV_HEADS", n_kv_heads),
            ("WARPS", _WARPS),
            ("UNROLL", _unroll(group)),
            ("MIN_CHUNK", _MIN_CHUNK),
            ("MAX_CHUNKS", _MAX_CHUNKS),
            ("IS_SHARED", cache.shared is not None),
        ],
        grid=(n_ids * n_kv_heads * 32 * _WARPS, n_chunks, 1),
        threadgroup=(32 * _WARPS, 1, 1),
        output_shapes=[
            (n_ids, 1, n_heads * width),
            (n_ids, n_heads, n_chunks, width),
            (n_ids, n_heads, n_chunks, 2),
        ],
        output_dtypes=[mx.bfloat16, mx.float32, mx.float32],
    )
    attended: mx.array = mixed
    return attended


def _unroll(group: int) -> int:
    """Positions that a thread has under way: as many as its registers hold."""
    return 4 if group <= 6 else 2


_INPUTS = (
    *("queries", "keys", "values", "cosines", "sines", "at"),
    *("cached_keys", "cached_values", "shared_keys", "shared_values", "arrived"),
)
# the cache is written to as well as `arrived`: MLX knows no output that is an input
_BODY = """
  const Cache cache = {
      const_cast<bf16*>(cached_keys), const_cast<bf16*>(cached_values), shared_keys, shared_values,
      cached_keys_shape[2], IS_SHARED ? shared_keys_shape[2] : 0};
  attend_chunk<WIDTH, GROUP, KV_HEADS, WARPS, UNROLL>(
      {queries, keys, values, cosines, sines}, at, cache,
      {sums, totals, arrived, MIN_CHUNK, MAX_CHUNKS, (int)gridDim.y}, mixed);
"""


@functools.cache
def _kernel() -> Any:
    return cuda_kernel(("decode_attention.cu",), "decode_attention", _INPUTS, ("mixed", "sums", "totals"), _BODY)
