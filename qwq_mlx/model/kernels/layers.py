"""The layers of a Qwen2 model that multiply few rows by the kernels of `few_row_matmul`, where those run.

An NVIDIA GPU, 4 bits, affine, groups of 32, 64 or 128, floats in bfloat16. What a layer holds stays the same.

More rows than `MAX_FEW_ROWS`, a prompt's, are multiplied with matrices that are unpacked for them, whatever their bits:
MLX 0.32.4's product of packed ones takes three times as long, and 45 s to compile for each range of row numbers. Few
rows of a layer whose shape or packing does not fit go through MLX's own kernels.

Each process compiles a kernel when it is first used, once for each 8 rows: MLX keeps no cache of them.

Does not: change a layer on Metal or the CPU.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwq_mlx.model.kernels.device import cuda_kernels_run
from qwq_mlx.model.kernels.few_row_matmul import ForNorm, PackedMatrix, for_norm, linear
from qwq_mlx.model.kernels.layer_graphs import LayerPackings, layer_graphs
from qwq_mlx.model.kernels.tiling import Tiling, choose_tiling
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS
from qwq_mlx.model.row_caches import InPlaceRows
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["run_layers", "use_few_row_kernels", "uses_few_row_kernels"]

_LAYERS_AT_ONCE = 8  # that are handed over to the GPU: describing all 64 takes 6 ms, in which it would wait


def use_few_row_kernels(module: Any) -> None:
    """Let the layers of a model (mlx_lm's Qwen2) multiply up to `MAX_FEW_ROWS` rows by the kernels, where they run."""
    if not cuda_kernels_run():
        return
    next_norm: Any = None  # of the next layer, where it was exchanged too
    for layer in reversed(module.layers):
        if _make_graphs(layer, next_norm):
            layer.__class__, next_norm = _block_class(), layer.input_layernorm
        else:
            next_norm = None
    if type(module.model) is import_mlx_lm("mlx_lm.models.qwen2").Qwen2Model:
        module.model.__class__ = _model_class()
    for each in module.modules():
        if type(each) is nn.QuantizedLinear:
            each.tiling, each.__class__ = _common_tiling((each,), has_bias=None), _CudaLinear


def uses_few_row_kernels(module: Any) -> bool:
    """Whether the kernels multiply by every matrix of a model, its output matrix among them."""
    head = None if module.args.tie_word_embeddings else module.lm_head
    return (
        isinstance(head, _CudaLinear)
        and head.tiling is not None
        and all(type(layer) is _block_class() for layer in module.layers)
    )


def run_layers(layers: Sequence[Any], x: Any, mask: Any, cache: Sequence[Any]) -> Any:
    """x behind these layers, each of which may leave to the next what it has begun of the next one's norm.

    Nobody changes x between two exchanged layers here; what stands in a layer's place gets and gives x alone.
    Where rows attend in place the GPU begins with the first layers while the later ones are described.
    """
    exchanged, left = _block_class(), None
    for index, (layer, own) in enumerate(zip(layers, cache, strict=True), 1):
        x, left = layer.run(x, mask, own, left) if type(layer) is exchanged else (layer(x, mask, own), None)
        if isinstance(own, InPlaceRows) and index % _LAYERS_AT_ONCE == 0:
            mx.async_eval(x)  # type: ignore[no-untyped-call]
    return x


@dataclass(frozen=True, slots=True)
class _Left:
    """What a layer leaves for the one behind it, whose norm it has begun. norm: that norm."""

    norm: Any
    begun: ForNorm


@dataclass(frozen=True, slots=True)
class _LayerArrays:
    """What a layer's graphs take of it, collected once: for each pass it would take as long as the graphs' calls.

    modules, names, values: where each array, and each part of the layer, was found.
    """

    before: list[mx.array]
    after: list[mx.array]
    modules: tuple[Any, ...]
    names: tuple[str, ...]
    values: tuple[Any, ...]

    def are_current(self) -> bool:
        """Whether nobody has given the layer other weights, or other parts."""
        return all(map(operator.is_, map(dict.get, self.modules, self.names), self.values))


def _make_graphs(layer: Any, next_norm: Any) -> bool:
    """Give a layer the graphs of what it is made of now; False where the kernels cannot compute that.

    next_norm: of the next layer, None where that is not exchanged.
    """
    packings = _packings_of(layer)
    if packings is None:
        return False
    hands_over = next_norm is not None and _is_bfloat16(next_norm.weight)
    object.__setattr__(layer, "next_norm", next_norm)  # not a part of this layer
    layer.graphs = layer_graphs(packings, hands_over=hands_over)
    layer.arrays = _arrays_of(layer, hands_over=hands_over)
    return True


def _arrays_of(layer: Any, *, hands_over: bool) -> _LayerArrays:
    attention, mlp, found = layer.self_attn, layer.mlp, list[tuple[Any, str, Any]]()
    before: list[mx.array] = []

    def take(module: Any, *names: str) -> list[Any]:
        found.extend((module, name, module[name]) for name in names)
        return [module[name] for name in names]

    take(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    after = take(layer.post_attention_layernorm, "weight")
    for owner, name, arrays in (
        *((attention, name, before) for name in ("q_proj", "k_proj", "v_proj")),
        (attention, "o_proj", after),
        *((mlp, name, after) for name in ("gate_proj", "up_proj", "down_proj")),
    ):
        found.append((owner, name, owner[name]))
        arrays.extend(take(owner[name], "weight", "scales", "biases", *(["bias"] if arrays is before else [])))
    next_weight = [] if layer.next_norm is None else take(layer.next_norm, "weight")
    after += next_weight if hands_over else []
    modules, names, values = zip(*found, strict=True)
    return _LayerArrays(before, after, modules, names, values)


def _packings_of(layer: Any) -> LayerPackings | None:
    """None where the kernels cannot compute all of a layer, as where a part was exchanged for one of another kind."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(type(norm) is not nn.RMSNorm or not _is_bfloat16(norm.weight) for norm in norms):
        return None
    if norms[0].eps != norms[1].eps or type(mlp) is not import_mlx_lm("mlx_lm.models.qwen2").MLP:
        return None
    three = _common_tiling((attention.q_proj, attention.k_proj, attention.v_proj), has_bias=True)
    pair = _common_tiling((mlp.gate_proj, mlp.up_proj), is_pair=True)
    out, down = _common_tiling((attention.o_proj,)), _common_tiling((mlp.down_proj,))
    if three is None or pair is None or out is None or down is None:
        return None
    if any(each.wide_from is not None and each.n_slices == 1 for each in (out, down)):
        return None  # they leave nothing for a norm
    return LayerPackings(norms[0].eps, attention.n_kv_heads, three, out, pair, down)


def _common_tiling(layers: Sequence[Any], *, has_bias: bool | None = False, is_pair: bool = False) -> Tiling | None:
    """How the matrices of some layers are covered alike; None where the kernels cannot multiply by all of them so.

    has_bias: what each layer must have; None is either.
    """
    tilings = {_tiling(layer, is_pair) if has_bias in (None, "bias" in layer) else None for layer in layers}
    return tilings.pop() if len(tilings) == 1 else None


def _tiling(layer: Any, is_pair: bool) -> Tiling | None:
    if type(layer) not in (nn.QuantizedLinear, _CudaLinear) or (layer.bits, layer.mode) != (4, "affine"):
        return None
    n_out, n_words = layer["weight"].shape
    return (
        choose_tiling(n_out, n_words * 8, layer.group_size, is_pair=is_pair) if _is_bfloat16(layer["scales"]) else None
    )


def _matrix(layer: Any) -> PackedMatrix:
    return PackedMatrix(layer["weight"], layer["scales"], layer["biases"])


def _is_bfloat16(array: Any) -> bool:
    return bool(array.dtype == mx.bfloat16)


def _n_rows(x: Any) -> int:
    return int(x.size) // int(x.shape[-1])


def _is_few(x: Any) -> bool:
    return _n_rows(x) <= MAX_FEW_ROWS and _is_bfloat16(x)


class _CudaLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """tiling: None where the kernels do not fit the matrix."""

    def __call__(self, x: Any) -> Any:
        if self.tiling is not None and _is_few(x):
            y = linear(x, _matrix(self), self.tiling)
        elif _n_rows(x) > MAX_FEW_ROWS:
            packing = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
            weight = mx.dequantize(self["weight"], self["scales"], self.get("biases"), dtype=x.dtype, **packing)
            y = x @ weight.T
        else:
            return super().__call__(x)
        return y + self["bias"] if "bias" in self else y


@functools.cache
def _block_class() -> type[Any]:
    class FewRowBlock(import_mlx_lm("mlx_lm.models.qwen2").TransformerBlock):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return self.run(x, mask, cache, None)[0]

        def run(self, x: Any, mask: Any, cache: Any, left: _Left | None) -> tuple[Any, _Left | None]:
            """What the layer gives, and leaves for the next. left: by the layer before, of x as it is."""
            if not _is_few(x) or not (self.arrays.are_current() or _make_graphs(self, self.next_norm)):
                return super().__call__(x, mask, cache), None
            norm = self.input_layernorm
            begun = left.begun if left is not None and left.norm is norm else for_norm(x, norm.weight)
            before, after = self.arrays.before, self.arrays.after
            if isinstance(cache, InPlaceRows) and len(cache.groups) == 1 and cache.others is None:
                [group] = cache.groups
                keys, values, shared = group.batch.whole()
                arrays = [keys, values, *(shared or ())]
                result = self.graphs.whole(x, list(cache.rotation), group.at, arrays, list(begun), before, after)
                cache.advance()
            else:
                *projected, zeros = self.graphs.before_attention(*begun, *before)
                mixed = self.self_attn.attend(projected, mask, cache, zeros)
                result = self.graphs.after_attention(mixed, x, *after)
            return result[0], _Left(self.next_norm, ForNorm(*result[1:])) if result[1:] else None

    return FewRowBlock


@functools.cache
def _model_class() -> type[Any]:
    home, base = import_mlx_lm("mlx_lm.models.qwen2"), import_mlx_lm("mlx_lm.models.base")

    class FewRowModel(home.Qwen2Model):  # type: ignore[misc, name-defined]
        def __call__(self, inputs: Any, cache: Any = None, input_embeddings: Any = None) -> Any:
            x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
            cache = [None] * len(self.layers) if cache is None else cache
            return self.norm(run_layers(self.layers, x, base.create_attention_mask(x, cache[0]), cache))

    return FewRowModel
