"""A layer of a Qwen2 model for `MIN_BLAS_ROWS` rows and more on the CPU, in numpy.

Linear layers multiply by numpy's BLAS there (`blas`), so MLX would stop and start for each of the seven of a layer.
What lies between them is a few operations on small arrays, which numpy does at once; rows in a batch attend by it, too.
MLX keeps the caches, and attends where they are quantized or begin alike.

The numbers are those of mlx_lm's layer up to rounding: with so many rows a row does not get the bits it gets alone.

Does not: draw, or read a prompt (many ids of one row go through mlx_lm's own layer).
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import numpy as np

from qwq_mlx.model.blas import Floats, multiply_rows
from qwq_mlx.model.blas_threads import one_blas_thread

__all__ = ["attend_rows", "many_rows"]


def many_rows(layer: Any, x: mx.array, cache: Any) -> mx.array:
    """What a layer gives for one id of each row. x: (rows, 1, hidden) float32; it is evaluated."""
    attention, mlp = layer.self_attn, layer.mlp
    n_rows = len(x)
    # exp of a gate that is shut overflows, and it is shut; a NaN, or an infinity, shows in the logits
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        hidden: Floats = np.asarray(x).reshape(n_rows, -1)
        normed = _rms_norm(hidden, layer.input_layernorm)
        cosines, sines = (np.asarray(each) for each in layer.rotations.at(cache.offset, 1))
        width = cosines.shape[-1]
        queries, keys, values = (
            multiply_rows(each, normed).reshape(n_rows, -1, 1, width)
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = _rotated(queries, cosines, sines), _rotated(keys, cosines, sines)
        mixed = attention.mix(mx.array(queries), mx.array(keys), mx.array(values), None, cache)
        hidden = hidden + multiply_rows(attention.o_proj, np.asarray(mixed).reshape(n_rows, -1))
        normed = _rms_norm(hidden, layer.post_attention_layernorm)
        gate = multiply_rows(mlp.gate_proj, normed)
        gate /= 1 + np.exp(-gate)
        gate *= multiply_rows(mlp.up_proj, normed)
        hidden += multiply_rows(mlp.down_proj, gate)
    return mx.array(hidden.reshape(n_rows, 1, -1))


def _rms_norm(x: Floats, norm: Any) -> Floats:
    squares = np.einsum("ij,ij->i", x, x)[:, None]
    scaled: Floats = x / np.sqrt(squares / x.shape[-1] + np.float32(norm.eps))
    scaled *= np.asarray(norm.weight)
    return scaled


def _rotated(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    """x: (rows, heads, 1, width). See `compiled_layers`."""
    half = x.shape[-1] // 2
    turned = x * cosines + np.concatenate([x[..., half:], x[..., :half]], axis=-1) * sines
    return cast("Floats", turned)


def attend_rows(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float, *, n_seen: int
) -> mx.array:
    """The attention of rows in a batch, (rows, heads, n_ids, width) float32; everything is evaluated.

    queries: (rows, heads, n_ids, width). keys, values: (rows, key heads, room, width), of which the first n_seen
    positions are looked at. mask: (rows, 1, n_ids, n_seen), true where an id may look; None is everywhere.
    MLX 0.32.4 takes ten times as long for 16 rows.
    """
    n_rows, n_heads, n_ids, width = queries.shape
    together = (n_rows, keys.shape[1], -1, width)  # the query heads of a key head
    scaled = np.asarray(queries).reshape(together) * np.float32(scale)
    scores = (scaled @ np.asarray(keys)[:, :, :n_seen].swapaxes(2, 3)).reshape(n_rows, n_heads, n_ids, -1)
    if mask is not None:
        scores[~np.broadcast_to(np.asarray(mask), scores.shape)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = scores.reshape(*together[:3], scores.shape[-1]) @ np.asarray(values)[:, :, :n_seen]
    return mx.array(mixed.reshape(queries.shape))
