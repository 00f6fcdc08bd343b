"""The layers of a Qwen2 model on the CPU, as two compiled graphs each: one before attention, one behind it.

For few rows MLX spends a third of a token's time on small operations: some 970 of a pass of 8 layers, for on the CPU
`rms_norm` and `rope` are 10 and 17 operations each. Compiled, neighbours of them are one loop, and the sines of a pass
are worked out once for all its layers instead of twice in each. The numbers are those of mlx_lm's own layers, to the
last bit where the compiler makes no fused multiply-adds (gcc on x86-64).

Only float32 on the CPU, packed affine or not packed, with plain rotary positions. From `MIN_BLAS_ROWS` rows on
`many_rows` takes over, and a prompt goes through mlx_lm's own layers. Without a C++ compiler MLX runs the same graphs
uncompiled; with one it compiles four loops, once for a machine, for it keeps them in the temporary folder.

Does not: change what a layer holds, or how rows attend (`attention` does).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwq_mlx.model.blas import multiplies_rows, uses_blas
from qwq_mlx.model.many_rows import many_rows
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.rotations import Rotations, is_plain_rope
from qwq_mlx.model.threaded_matmul import threaded_quantized_matmul
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["use_compiled_layers"]

_Packing = tuple[int, int] | None
"""group_size and bits of a matrix; None for floats."""


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


@dataclass(frozen=True, slots=True)
class _LayerGraphs:
    """What a layer computes before and after its attention, shared by layers alike.

    before_attention: (x, cosines, sines, norm, arrays of q, k and v) -> queries, keys, values, each
      (rows, heads, n_ids, width), the first two rotated.
    after_attention: (mixed, x, norm, arrays of o, gate, up and down) -> what the layer gives.
    """

    before_attention: Callable[..., list[mx.array]]
    after_attention: Callable[..., mx.array]


def _graphs_of(layer: Any) -> _LayerGraphs | None:
    """None where a layer is not of the kind that the graphs compute."""
    attention, mlp = layer.self_attn, layer.mlp
    before = (attention.q_proj, attention.k_proj, attention.v_proj)
    after = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(multiplies_rows(each) for each in (*before, *after)):
        return None
    width = attention.q_proj.weight.shape[0] // attention.n_heads
    if not is_plain_rope(attention.rope, width):
        return None
    return _graphs(
        layer.input_layernorm.eps,
        width,
        tuple(_packing(each) for each in before),
        tuple(_packing(each) for each in after),
    )


@functools.cache
def _graphs(eps: float, width: int, before: Sequence[_Packing], after: Sequence[_Packing]) -> _LayerGraphs:
    swiglu = import_mlx_lm("mlx_lm.models.activations").swiglu

    def before_attention(x: mx.array, cosines: mx.array, sines: mx.array, norm: mx.array, *each: list[mx.array]) -> Any:
        normed = mx.fast.rms_norm(x, norm, eps)
        queries, keys, values = (
            _product(normed, arrays, packing).reshape(*x.shape[:2], -1, width).transpose(0, 2, 1, 3)
            for arrays, packing in zip(each, before, strict=True)
        )
        return _rotated(queries, cosines, sines), _rotated(keys, cosines, sines), values

    def after_attention(mixed: mx.array, x: mx.array, norm: mx.array, *each: list[mx.array]) -> mx.array:
        x = x + _product(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), each[0], after[0])
        normed = mx.fast.rms_norm(x, norm, eps)
        gated = swiglu(_product(normed, each[1], after[1]), _product(normed, each[2], after[2]))
        return x + _product(gated, each[3], after[3])

    return _LayerGraphs(mx.compile(before_attention), mx.compile(after_attention))


def _packing(layer: Any) -> _Packing:
    return (layer.group_size, layer.bits) if "scales" in layer else None


def _arrays(layer: Any) -> list[mx.array]:
    """What `_product` takes of a layer."""
    names = ("weight", "scales", "biases", "bias") if "scales" in layer else ("weight", "bias")
    return [layer[name] for name in names if name in layer]


def _product(x: mx.array, arrays: Sequence[mx.array], packing: _Packing) -> mx.array:
    """As mlx.nn's linear layers."""
    if packing is None:
        weight, *bias = arrays
        return mx.addmm(bias[0], x, weight.T) if bias else x @ weight.T
    group_size, bits = packing
    weight, scales, biases, *bias = arrays
    y = threaded_quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits)
    return y + bias[0] if bias else y


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
            three = (attention.q_proj, attention.k_proj, attention.v_proj)
            rotated = self.graphs.before_attention(
                x, *rotations, self.input_layernorm.weight, *(_arrays(each) for each in three)
            )
            mixed = attention.mix(*rotated, mask, cache)
            rest = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            return self.graphs.after_attention(
                mixed, x, self.post_attention_layernorm.weight, *(_arrays(each) for each in rest)
            )

    return CompiledBlock
