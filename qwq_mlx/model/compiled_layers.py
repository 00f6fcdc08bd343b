"""The layers of a Qwen2 model on the CPU, as two compiled graphs each: one before attention, one behind it.

For few rows MLX spends a third of a token's time on small operations: some 970 of a pass of 8 layers, for on the CPU
`rms_norm` and `rope` are 10 and 17 operations each. Compiled, neighbours of them are one loop, and the sines of a pass
are worked out once for all its layers instead of twice in each. The numbers are those of mlx_lm's own layers, to the
last bit where the compiler makes no fused multiply-adds (gcc on x86-64).

Only float32 on the CPU, packed affine, with plain rotary positions. From `MIN_BLAS_ROWS` rows on, and in every other
layer, mlx_lm's own code runs. Without a C++ compiler MLX runs the same graphs uncompiled; with one it compiles four
loops, once for a machine, for it keeps them in the temporary folder.

Does not: change what a layer holds, or how rows attend (`attention` does).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwq_mlx.model.blas import is_packed_for_rows, uses_blas
from qwq_mlx.model.many_rows import many_rows
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["use_compiled_layers"]

_Packing = tuple[int, int]
"""group_size and bits of a matrix."""


def use_compiled_layers(module: Any) -> None:
    """Let the layers of a model (mlx_lm's Qwen2, after `use_blas_for_rows`) compute few rows by compiled graphs."""
    if not uses_blas(module):
        return
    rotations: dict[tuple[int, float], Rotations] = {}
    for layer in module.layers:
        attention = layer.self_attn
        graphs = _graphs_of(layer)
        if graphs is not None:
            key = (attention.rope.dims, attention.rope.base)
            layer.rotations = rotations.setdefault(key, Rotations(*key))
            layer.graphs, layer.__class__ = graphs, _block_class()


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


@dataclass(frozen=True, slots=True)
class _LayerGraphs:
    """What a layer computes before and after its attention, shared by layers alike.

    before_attention: (x, cosines, sines, norm, packed and biases of q, k, v) -> queries, keys, values, each
      (rows, heads, n_ids, width), the first two rotated.
    after_attention: (mixed, x, norm, packed o, gate, up and down) -> what the layer gives.
    """

    before_attention: Callable[..., list[mx.array]]
    after_attention: Callable[..., mx.array]


def _graphs_of(layer: Any) -> _LayerGraphs | None:
    """None where a layer is not of the kind that the graphs compute."""
    attention, mlp = layer.self_attn, layer.mlp
    before = (attention.q_proj, attention.k_proj, attention.v_proj)
    after = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(is_packed_for_rows(each) for each in (*before, *after)):
        return None
    width = attention.q_proj.weight.shape[0] // attention.n_heads
    rope = attention.rope
    if type(rope) is not nn.RoPE or rope.traditional or rope.scale != 1.0 or rope.dims != width:
        return None
    if not all("bias" in each for each in before) or any("bias" in each for each in after):
        return None
    return _graphs(
        layer.input_layernorm.eps,
        width,
        tuple((each.group_size, each.bits) for each in before),
        tuple((each.group_size, each.bits) for each in after),
    )


@functools.cache
def _graphs(eps: float, width: int, before: Sequence[_Packing], after: Sequence[_Packing]) -> _LayerGraphs:
    swiglu = import_mlx_lm("mlx_lm.models.activations").swiglu

    def before_attention(x: mx.array, cosines: mx.array, sines: mx.array, norm: mx.array, *packed: mx.array) -> Any:
        normed = mx.fast.rms_norm(x, norm, eps)
        queries, keys, values = (
            (_product(normed, packed[4 * n : 4 * n + 3], packing) + packed[4 * n + 3])
            .reshape(*x.shape[:2], -1, width)
            .transpose(0, 2, 1, 3)
            for n, packing in enumerate(before)
        )
        return _rotated(queries, cosines, sines), _rotated(keys, cosines, sines), values

    def after_attention(mixed: mx.array, x: mx.array, norm: mx.array, *packed: mx.array) -> mx.array:
        def product(y: mx.array, n: int) -> mx.array:
            return _product(y, packed[3 * n : 3 * n + 3], after[n])

        x = x + product(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), 0)
        normed = mx.fast.rms_norm(x, norm, eps)
        return x + product(swiglu(product(normed, 1), product(normed, 2)), 3)

    return _LayerGraphs(mx.compile(before_attention), mx.compile(after_attention))


def _product(x: mx.array, packed: Sequence[mx.array], packing: _Packing) -> mx.array:
    weight, scales, biases = packed
    group_size, bits = packing
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


def _rotated(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """The two halves of each head as the parts of complex numbers, turned; the sines' first half is negative."""
    half = x.shape[-1] // 2
    return x * cosines + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * sines


@functools.cache
def _block_class() -> type[Any]:
    class CompiledBlock(import_mlx_lm("mlx_lm.models.qwen2").TransformerBlock):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            n_rows, n_ids = x.shape[:2]
            if n_ids == 1 and n_rows >= MIN_BLAS_ROWS and cache is not None:
                return many_rows(self, x, cache)
            if n_rows * n_ids >= MIN_BLAS_ROWS:
                return super().__call__(x, mask, cache)
            attention, mlp = self.self_attn, self.mlp
            rotations = self.rotations.at(0 if cache is None else cache.offset, n_ids)
            arrays = [a for p in (attention.q_proj, attention.k_proj, attention.v_proj) for a in (*_matrix(p), p.bias)]
            rotated = self.graphs.before_attention(x, *rotations, self.input_layernorm.weight, *arrays)
            mixed = attention.mix(*rotated, mask, cache)
            rest = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            arrays = [array for each in rest for array in _matrix(each)]
            return self.graphs.after_attention(mixed, x, self.post_attention_layernorm.weight, *arrays)

    return CompiledBlock


def _matrix(layer: Any) -> tuple[mx.array, mx.array, mx.array]:
    return layer.weight, layer.scales, layer.biases
