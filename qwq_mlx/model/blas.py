"""Linear layers of float32 on the CPU by numpy's BLAS, where MLX's own products are slow.

MLX 0.32.4 multiplies by a packed matrix one row at a time on the CPU, so a prompt costs what as many decode steps do.
From `MIN_BLAS_ROWS` rows on, a block of the matrix at a time is unpacked, and all rows are multiplied by it at once.
The results differ from MLX's in the last bits: with fewer rows a row gets the bits that it gets alone, with more it
may not.

Does not: choose the compute type, or touch a layer on another backend.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from qwq_mlx.model.blas_threads import by_blocks
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.threaded_matmul import threaded_quantized_matmul

__all__ = [
    "Blas",
    "Floats",
    "blas_quantized_matmul",
    "causal_attention",
    "multiplies_rows",
    "multiply_rows",
    "use_blas",
    "use_blas_for_rows",
    "uses_blas",
]

_MARK = "_multiplies_by_blas"  # of a model; to look at all its layers takes 2 ms for each run
_NUMPY_BITS = (2, 4, 8)  # whole codes in a byte; others are unpacked by MLX
_QUERIES = 512  # that attend at a time: their scores stay small whatever the length

Floats = npt.NDArray[np.float32]


class Blas:
    """A linear layer of float32 on the CPU, by numpy (some 27 times as fast as MLX 0.32.4's own).

    weight: (out, in), an array of MLX, which shares its memory with numpy, or of numpy. bias: (out,), of MLX.
    """

    def __init__(self, weight: Any, bias: Any = None) -> None:
        self._weight, self.bias = np.asarray(weight), bias

    def __call__(self, x: Any) -> Any:
        """x @ weight.T and the bias; x is evaluated."""
        rows: Floats = np.asarray(x).reshape(-1, x.shape[-1])
        y = mx.array(_multiply_floats(rows, self._weight).reshape(*x.shape[:-1], -1))
        return y if self.bias is None else y + self.bias


def use_blas(block: Any) -> None:
    """Exchange the float linear layers of a layer (mlx_lm's) for `Blas`, and let it attend by BLAS, without a cache."""
    attention: type[nn.Module] = type(block.self_attn)
    block.self_attn.__class__ = _attention_class(attention)
    for part in (block.self_attn, block.mlp):
        for name, linear in part.children().items():
            if type(linear) is nn.Linear:
                setattr(part, name, Blas(linear.weight, linear.bias if "bias" in linear else None))


def _attention_class(kind: type[nn.Module]) -> type[nn.Module]:
    """mlx_lm's attention, by BLAS."""

    class BlasAttention(kind):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> mx.array:
            return _attend(self, x)

    return BlasAttention


def _attend(attention: Any, x: Any) -> mx.array:
    """What mlx_lm's Qwen2 attention computes for one text without a cache. x: (1, positions, hidden)."""
    n_heads, length = attention.n_heads, x.shape[1]

    def heads(values: Any, n: int) -> Any:
        return values.reshape(1, length, n, -1).transpose(0, 2, 1, 3)  # (1, heads, positions, width)

    queries = np.asarray(attention.rope(heads(attention.q_proj(x), n_heads)))[0]
    keys = np.asarray(attention.rope(heads(attention.k_proj(x), attention.n_kv_heads)))[0]
    values = np.asarray(heads(attention.v_proj(x), attention.n_kv_heads))[0]
    out = causal_attention(queries, keys, values, scale=attention.scale)
    return cast("mx.array", attention.o_proj(mx.array(out.reshape(1, length, -1))))


def causal_attention(queries: Floats, keys: Floats, values: Floats, *, scale: float) -> Floats:
    """Attention of each position to itself and those before, (positions, heads, width).

    queries: (heads, positions, width); keys, values: (key heads, positions, width).
    """
    n_heads, length, width = queries.shape
    out = np.empty((length, n_heads, width), np.float32)
    for head in range(n_heads):
        of = head * len(keys) // n_heads
        for first in range(0, length, _QUERIES):
            last = min(first + _QUERIES, length)
            scores = queries[head, first:last] @ keys[of, :last].T
            scores *= np.float32(scale)
            scores[np.arange(last) > np.arange(first, last)[:, None]] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            weighted = scores @ values[of, :last]
            out[first:last, head] = weighted / scores.sum(axis=1, keepdims=True)
    return out


def _multiply_floats(x: Floats, weight: Floats) -> Floats:
    """x @ weight.T. x: (rows, in). weight: (out, in)."""
    columns = x.T
    out = np.empty((len(weight), columns.shape[1]), np.float32)

    def multiply(block: slice) -> None:
        np.matmul(weight[block], columns, out=out[block])

    by_blocks(multiply, *weight.shape)
    return np.ascontiguousarray(out.T)


def blas_quantized_matmul(x: Any, weight: Any, scales: Any, biases: Any, *, group_size: int, bits: int) -> mx.array:
    """`mx.quantized_matmul(x, ..., transpose=True)` of affine codes in float32: a block of the matrix, then BLAS.

    x: (..., in); it is evaluated. weight: (out, in * bits / 32) uint32; scales, biases: (out, in / group_size).
    Returns (..., out) float32. Takes 5 MiB of memory for each processor beside the result.
    """
    rows: Floats = np.asarray(x).reshape(-1, x.shape[-1])
    y = _multiply_packed(rows, weight, scales, biases, group_size=group_size, bits=bits)
    return mx.array(y.reshape(*x.shape[:-1], -1))


def _multiply_packed(x: Floats, weight: Any, scales: Any, biases: Any, *, group_size: int, bits: int) -> Floats:
    """The same of numpy's rows, (rows, in) -> (rows, out)."""
    n_rows, n_in = x.shape
    scale, bias = np.asarray(scales), np.asarray(biases)
    columns = x.T.reshape(-1, group_size, n_rows)  # of each group: its products are multiplied by its scale
    # codes * scale + bias: what a group's bias adds is the same for all its codes, so x's sums over groups do
    sums = columns.sum(1)
    out = np.empty((n_rows, len(scale)), np.float32)

    def multiply(block: slice) -> None:
        floats = np.empty((block.stop - block.start, n_in), np.float32)
        _unpack(weight, block, bits, floats)
        groups = floats.reshape(len(floats), -1, group_size)
        if n_rows < group_size:  # fewer numbers to scale than the weights of the group are
            products = groups.transpose(1, 0, 2) @ columns  # (groups, out, rows)
            product = (scale[block, None] @ products.transpose(1, 0, 2))[:, 0]
        else:
            groups *= scale[block, :, None]
            product = floats @ x.T  # transposed: with few rows OpenBLAS is twice as quick so
        product += bias[block] @ sums
        out[:, block] = product.T

    by_blocks(multiply, len(scale), n_in, is_threaded=bits in _NUMPY_BITS)
    return out


def _unpack(weight: Any, block: slice, bits: int, floats: Floats) -> None:
    """The codes of some rows as floats, into `floats`: (rows, in)."""
    packed = np.asarray(weight)[block]
    if bits in _NUMPY_BITS:
        codes = packed.view(np.uint8)
        for n_bits in (4, 2):
            if bits <= n_bits:
                codes = _halves(codes, n_bits)
        floats[...] = codes
    else:
        ones = mx.ones((floats.shape[0], floats.shape[1] // 32))
        floats[...] = np.asarray(mx.dequantize(mx.array(packed), ones, mx.zeros_like(ones), group_size=32, bits=bits))


def _halves(codes: npt.NDArray[np.uint8], n_bits: int) -> npt.NDArray[np.uint8]:
    """Of each byte its lowest n_bits and the n_bits above them, a byte each: (rows, n) -> (rows, 2 n).

    A few operations on whole arrays of small integers: a third of the time of a look-up in a table.
    """
    pairs = codes.astype("<u2")
    pairs |= pairs << (8 - n_bits)
    pairs &= (2**n_bits - 1) * 0x0101
    return pairs.view(np.uint8)


class _RowsLinear(nn.Linear):  # type: ignore[misc]
    def __call__(self, x: Any) -> Any:
        if _n_rows(x) < MIN_BLAS_ROWS:
            return super().__call__(x)
        return Blas(self.weight, self.bias if "bias" in self else None)(x)


class _RowsQuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    def __call__(self, x: Any) -> Any:
        y = _packed_product(self, x)
        return y + self["bias"] if "bias" in self else y


class _RowsQuantizedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    def as_linear(self, x: Any) -> Any:
        return _packed_product(self, x)


class _RowsEmbedding(nn.Embedding):  # type: ignore[misc]
    def as_linear(self, x: Any) -> Any:
        return super().as_linear(x) if _n_rows(x) < MIN_BLAS_ROWS else Blas(self.weight)(x)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _RowsLinear,
    nn.QuantizedLinear: _RowsQuantizedLinear,
    nn.QuantizedEmbedding: _RowsQuantizedEmbedding,
    nn.Embedding: _RowsEmbedding,
}


def use_blas_for_rows(module: Any) -> None:
    """From `MIN_BLAS_ROWS` rows on, let the linear layers of a model (mlx_lm's) multiply by BLAS.

    Only where it computes in float32 on the CPU. A layer of a mode other than affine stays as it is.
    """
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))
    floats = {array.dtype for _, array in arrays if mx.issubdtype(array.dtype, mx.floating)}
    if mx.default_device().type != mx.cpu or floats != {mx.float32}:
        return
    for each in module.modules():
        if type(each) in _CLASSES and getattr(each, "mode", "affine") == "affine":
            each.__class__ = _CLASSES[type(each)]  # what a layer holds stays the same, only its product is another
    setattr(module, _MARK, True)


def multiplies_rows(layer: Any) -> bool:
    """Whether a layer is a linear one that `use_blas_for_rows` has changed."""
    return type(layer) in (_RowsLinear, _RowsQuantizedLinear)


def multiply_rows(layer: Any, x: Floats) -> Floats:
    """What such a layer makes of numpy's rows, (rows, in) -> (rows, out)."""
    if isinstance(layer, _RowsLinear):
        y = _multiply_floats(x, np.asarray(layer.weight))
    else:
        y = _multiply_packed(x, layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits)
    if "bias" in layer:
        y += np.asarray(layer.bias)
    return y


def uses_blas(module: Any) -> bool:
    """Whether `use_blas_for_rows` was done to a model."""
    return bool(getattr(module, _MARK, False))


def _n_rows(x: Any) -> int:
    return int(x.size) // int(x.shape[-1])


def _packed_product(layer: Any, x: Any) -> mx.array:
    multiply = threaded_quantized_matmul if _n_rows(x) < MIN_BLAS_ROWS else blas_quantized_matmul
    return multiply(x, layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits)
