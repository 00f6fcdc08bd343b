"""Modules to measure: QwQ's shapes with few layers and random 4-bit weights, and twins in another compute type.

Speed depends on shapes and types, not on what the weights say, so a model of QwQ's widths with 2 of its 64 layers shows
a layer's and the output head's cost without 18 GB. Random codes get scales that keep activations near 1, so that
logits stay finite.

Does not: load files (`model.load` does), or tell anything about quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes
from qwq_mlx.model.blas import use_blas_for_rows
from qwq_mlx.model.compiled_layers import use_compiled_layers
from qwq_mlx.model.kernels.layers import use_few_row_kernels
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.load import ComputeType, build_module
from qwq_mlx.model.rotations import use_in_place_attention
from qwq_mlx.model.upstream import import_mlx

__all__ = ["PACKING", "in_compute_type", "qwq_shaped", "random_module"]

_CONTEXT = 32_768
PACKING = Packing(bits=4, group_size=64)


def qwq_shaped(n_layers: int) -> tuple[Qwen2Config, dict[str, Packing]]:
    """QwQ-32B-Preview's config with n_layers of its layers, all matrices at 4 bits, group 64."""
    facts = QWQ_32B_PREVIEW
    config = Qwen2Config(
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        vocab_size=facts.vocab_size,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_ids=(),
    )
    matrices = [name.removesuffix(".weight") for name, shape in tensor_shapes(config).items() if len(shape) == 2]
    return config, dict.fromkeys(matrices, PACKING)


def random_module(config: Qwen2Config, packed: Mapping[str, Packing], compute_type: ComputeType, *, seed: int) -> Any:
    """A module of this shape with random weights, in memory. Matrices that packed does not name are not packed."""
    mx = import_mlx()
    module = build_module(config, packed)
    dtype = getattr(mx, compute_type)
    keys = iter(mx.random.split(mx.random.key(seed), len(tensor_shapes(config))))
    weights: list[tuple[str, Any]] = []
    for name, shape in tensor_shapes(config).items():
        path = name.removesuffix(".weight")
        if path not in packed:
            if len(shape) == 2:
                weights.append((name, mx.random.normal(shape, dtype, scale=shape[1] ** -0.5, key=next(keys))))
            else:
                mean = 1.0 if name.endswith("norm.weight") else 0.0
                weights.append((name, mx.random.normal(shape, dtype, loc=mean, scale=0.25, key=next(keys))))
            continue
        rows, columns = shape
        packing = packed[path]
        n_words = columns * packing.bits // 32
        # MLX draws integers from 24 bits: the last ones of 32 would be zeros
        codes = mx.random.randint(0, 2**16, (rows, 2 * n_words), mx.uint16, key=next(keys)).view(mx.uint32)
        # codes are uniform on 0 ... n - 1, of deviation (n^2 - 1)/12 to the root; columns^-0.5 keeps activations near 1
        n_codes = 2**packing.bits
        scale = (12 / (n_codes**2 - 1) / columns) ** 0.5
        scales = mx.full((rows, columns // packing.group_size), scale, dtype)
        weights += [(name, codes), (f"{path}.scales", scales), (f"{path}.biases", scales * (-(n_codes - 1) / 2))]
    module.load_weights(weights, strict=True)
    module.eval()
    weights.clear()
    for layer in module.layers:
        mx.eval(layer.parameters())  # one layer at a time, so that little stands beside the finished weights
    mx.eval(module.parameters())
    use_blas_for_rows(module)
    use_compiled_layers(module)
    use_few_row_kernels(module)
    use_in_place_attention(module)
    return module


def in_compute_type(module: Any, config: Qwen2Config, packed: Mapping[str, Packing], compute_type: ComputeType) -> Any:
    """mlx_lm's linear layers on the same packed codes, with floats of another compute type or, of the same, these."""
    mx = import_mlx()
    from mlx.utils import tree_flatten

    twin = build_module(config, packed)
    dtype = getattr(mx, compute_type)
    arrays = tree_flatten(module.parameters())
    twin.load_weights([(name, a if a.dtype == mx.uint32 else a.astype(dtype)) for name, a in arrays], strict=True)
    twin.eval()
    mx.eval(twin.parameters())
    return twin
