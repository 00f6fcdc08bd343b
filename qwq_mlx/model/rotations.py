"""Sines and cosines of rotary positions, worked out once for all layers of a pass.

Does not: read the settings (`rope` does), or rotate.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwq_mlx.model.kernels.decode_attention import attends_in_place
from qwq_mlx.model.kernels.device import cuda_kernels_run

__all__ = ["Rotations", "is_plain_rope", "rotations_in_place", "use_in_place_attention"]

_MARK = "_rotations_in_place"  # of a model


class Rotations:
    """What `mx.fast.rope` multiplies by, worked out once for all layers of a pass.

    width: of a head. base: rope_theta.
    """

    def __init__(self, width: int, base: float) -> None:
        half = width // 2
        rates = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * mx.array(math.log(base) / half, mx.float32))
        signs = mx.concatenate([-mx.ones(half), mx.ones(half)])
        mx.eval(rates, signs)
        self._rates, self._signs = rates, signs
        self._latest: tuple[Any, int, tuple[mx.array, mx.array]] | None = None

    def at(self, offset: int | mx.array, n_ids: int) -> tuple[mx.array, mx.array]:
        """Cosines and signed sines, (1 or rows, 1, n_ids, width). offset: of all rows, or (rows,) of each."""
        if self._latest is not None:
            known, n_known, both = self._latest
            if n_known == n_ids and (known is offset or (type(known) is type(offset) is int and known == offset)):
                return both
        places = mx.array([offset]) if isinstance(offset, int) else offset
        if n_ids > 1:
            places = places[:, None] + mx.arange(n_ids)
        angles = places.reshape(-1, 1, n_ids, 1).astype(mx.float32) * self._rates
        cosines, sines = mx.cos(angles), mx.sin(angles)  # not compiled: two loops more to wait for, for two operations
        both = mx.concatenate([cosines] * 2, axis=-1), mx.concatenate([sines] * 2, axis=-1) * self._signs
        self._latest = (offset, n_ids, both)
        return both


def is_plain_rope(rope: Any, width: int) -> bool:
    """Whether a layer of mlx_lm's rotates heads of this width as `Rotations` does."""
    return type(rope) is nn.RoPE and not rope.traditional and rope.scale == 1.0 and rope.dims == width


def use_in_place_attention(module: Any) -> None:
    """Let few ids of rows attend by `kernels.decode_attention` in a model (mlx_lm's Qwen2), where that runs.

    Floats in bfloat16, plain rotary positions, all layers alike.
    """
    if not cuda_kernels_run():
        return
    attention = module.layers[0].self_attn
    rope, width = attention.rope, int(attention.q_proj.weight.shape[0]) // attention.n_heads
    floats = module.layers[0].input_layernorm.weight.dtype
    if (
        floats == mx.bfloat16
        and attends_in_place(attention.n_heads, attention.n_kv_heads, width)
        and all(is_plain_rope(layer.self_attn.rope, width) for layer in module.layers)
    ):
        setattr(module, _MARK, Rotations(width, rope.base))


def rotations_in_place(module: Any) -> Rotations | None:
    """Those of a model whose rows attend in place; None where they do not."""
    found: Rotations | None = getattr(module, _MARK, None)
    return found
