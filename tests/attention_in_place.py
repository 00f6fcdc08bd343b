"""A plain twin of the kernel that attends in place on an NVIDIA GPU, and a small model whose rows attend by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from configs import SMALL

from qwq_mlx.bench.models import random_module
from qwq_mlx.model import attention, rotations
from qwq_mlx.model.kernels.decode_attention import CacheArrays, Rotation
from qwq_mlx.model.rotations import rotations_in_place

__all__ = ["CONFIG", "attend", "module_in_place"]

CONFIG = replace(SMALL, hidden_size=256, vocab_size=64, max_position_embeddings=2048)


def module_in_place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Random weights of CONFIG in bfloat16; until the test ends its rows attend in place."""
    monkeypatch.setattr(rotations, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(attention, "decode_attention", attend)
    made = random_module(CONFIG, {}, "bfloat16", seed=1)
    assert rotations_in_place(made) is not None
    return made


def attend(
    projected: Sequence[mx.array], rotation: Rotation, at: mx.array, cache: CacheArrays, arrived: mx.array | None = None
) -> mx.array:
    """What the kernel does, one id after another; it counts no blocks."""
    mx.eval(*projected, *rotation, cache.keys, cache.values)
    n_kv_heads, width = cache.keys.shape[1], cache.keys.shape[3]
    n_shared = 0 if cache.shared is None else cache.shared[0].shape[2]
    mixed = []
    for row, place, first, before in at.tolist():
        position = before + place - first
        query, key, value = (each.reshape(-1, each.shape[-1])[place].reshape(1, -1, 1, width) for each in projected)
        query, key = (_rotated(each, rotation, place) for each in (query, key))
        for array, new in ((cache.keys, key), (cache.values, value)):
            bits = np.asarray(array.view(mx.uint16))  # the same memory
            if not bits.flags.c_contiguous:
                bits = bits.copy()  # as MLX gives it to a kernel: what is written there is lost
            bits[row, :, position - n_shared] = np.asarray(new.reshape(n_kv_heads, width).view(mx.uint16))
        seen = [own[row : row + 1, :, : position + 1 - n_shared] for own in (cache.keys, cache.values)]
        if cache.shared is not None:
            seen = [mx.concatenate([*pair], axis=2) for pair in zip(cache.shared, seen, strict=True)]
        mixed.append(mx.fast.scaled_dot_product_attention(query, *seen, scale=width**-0.5).reshape(1, 1, -1))
        mx.eval(mixed[-1])
    return mx.concatenate(mixed)


def _rotated(heads: mx.array, rotation: Rotation, place: int) -> mx.array:
    half = heads.shape[-1] // 2
    turned = mx.concatenate([heads[..., half:], heads[..., :half]], axis=-1)
    return (heads * rotation.cosines[place] + turned * rotation.sines[place]).astype(mx.bfloat16)
