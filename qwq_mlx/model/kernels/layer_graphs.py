"""What a layer of few rows computes, as compiled graphs of the kernels of `few_row_matmul` and `decode_attention`.

A layer is five launches, or six, and no view of an array, for the host takes microseconds for each: queries, keys and
values; attention; the output projection; gate and up; and the down projection. Output and down projections add the
residual and begin the norm behind them, the down projection that of the next layer; the products behind end it.

Does not: choose which layers are computed so (`layers` does).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.kernels.decode_attention import CacheArrays, Rotation, decode_attention
from qwq_mlx.model.kernels.few_row_matmul import (
    ForNorm,
    PackedMatrix,
    linear,
    linear_for_norm,
    linears,
    swiglu_linears,
)
from qwq_mlx.model.kernels.tiling import Tiling
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS

__all__ = ["BoundedGraph", "LayerGraphs", "LayerPackings", "layer_graphs"]


class LayerPackings(NamedTuple):
    """What the graphs of a layer depend on. three: of queries, keys and values. pair: of gate and up."""

    eps: float
    n_kv_heads: int
    three: Tiling
    out: Tiling
    pair: Tiling
    down: Tiling


@dataclass(frozen=True, slots=True)
class LayerGraphs:
    """What a layer computes before and after its attention, each one compiled graph, shared by layers alike.

    before_attention: (x, packed and biases of q, k, v) -> their products, and zeros for `decode_attention`; x as the
    layer before left it. after_attention: (mixed, x, norm, packed o, gate, up and down, perhaps the norm of the next
    layer) -> what the layer gives, and perhaps leaves for the next.
    whole: both with the attention of one batch in place: (x, rotation, at, its keys and values, and those that its rows
    share, if any; x as left, what both take).
    """

    before_attention: Callable[..., list[mx.array]]
    after_attention: Callable[..., list[mx.array]]
    whole: BoundedGraph

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGraphs:
        """Itself: it holds no weights, so a copy of a model may share it."""
        return self


@functools.cache
def layer_graphs(packings: LayerPackings, *, hands_over: bool) -> LayerGraphs:
    """The graphs of layers of these packings. hands_over: whether the layer begins the norm of the next one."""
    eps, n_kv_heads, three, out, pair, down = packings

    def before_attention(weighted: mx.array, squares: mx.array, *packed: mx.array) -> list[mx.array]:
        matrices = [(PackedMatrix(*packed[first : first + 3]), packed[first + 3]) for first in (0, 4, 8)]
        left, n_zeros = ForNorm(weighted, squares), MAX_FEW_ROWS * n_kv_heads
        products, zeros = linears(left, matrices, three, eps=eps, n_zeros=n_zeros)
        return [*products, zeros]

    def after_attention(mixed: mx.array, x: mx.array, norm: mx.array, *packed: mx.array) -> list[mx.array]:
        o, gate, up, last = (PackedMatrix(*packed[first : first + 3]) for first in (0, 3, 6, 9))
        x, left = linear_for_norm(mixed, o, out, residual=x, norm=norm)
        gated = swiglu_linears(left, gate, up, pair, eps=eps)
        if not hands_over:
            return [linear(gated, last, down, residual=x)]
        x, left = linear_for_norm(gated, last, down, residual=x, norm=packed[12])
        return [x, *left]

    def whole(
        x: mx.array,
        rotation: Sequence[mx.array],
        at: mx.array,
        cache: Sequence[mx.array],
        left: Sequence[mx.array],
        before: Sequence[mx.array],
        after: Sequence[mx.array],
    ) -> list[mx.array]:
        *projected, zeros = before_attention(*left, *before)
        keys, values, *shared = cache
        arrays = CacheArrays(keys, values, (shared[0], shared[1]) if shared else None)
        mixed = decode_attention(projected, Rotation(*rotation), at, arrays, zeros)
        return after_attention(mixed, x, *after)

    return LayerGraphs(mx.compile(before_attention), mx.compile(after_attention), BoundedGraph(whole))


class BoundedGraph:
    """A compiled function that forgets all shapes that it was traced for where there are `MAX_SHAPES`.

    MLX keeps every one for as long as the function lives, 0.1 MB each, and looks through them at each call; caches come
    in any number of shapes. function: its arguments are x, rotation, at, cache and others of ever the same shapes.
    """

    MAX_SHAPES = 64  # passes of 1 to `MAX_FEW_ROWS` ids, before and behind a growth of their cache

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled = mx.compile(function)
        self._latest: tuple[Any, ...] = ()
        self._known: set[tuple[Any, ...]] = set()

    def __call__(
        self, x: mx.array, rotation: Sequence[mx.array], at: mx.array, cache: Sequence[mx.array], *others: Any
    ) -> Any:
        """What the function gives. cache: keys and values, and perhaps those of a shared beginning."""
        shapes = (x.shape, *(each.shape for each in cache[::2]))  # values have the shape of keys
        if shapes != self._latest:
            if shapes not in self._known and len(self._known) == self.MAX_SHAPES:
                self._known.clear()
                self._compiled = mx.compile(self._function)
            self._known.add(shapes)
            self._latest = shapes
        return self._compiled(x, rotation, at, cache, *others)
