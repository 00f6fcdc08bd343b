"""Weights, cache and passes of a workload in bytes: weights and cache exactly as MLX allocates them.

Does not: add them up (`plan` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.memory.activations import pass_bytes
from qwq_mlx.model.memory.workload import FLOAT_BYTES, KV_GROUP, Backend, ModelShape, Workload
from qwq_mlx.model.tensor_parallel import split_axis
from qwq_mlx.quant.recipe import layer_of

__all__ = ["bytes_of_float", "bytes_of_pass", "kv_bytes_per_token", "load_bytes", "weights_bytes"]


def bytes_of_float(workload: Workload, backend: Backend) -> int:
    """One number in the compute type."""
    return FLOAT_BYTES[workload.compute_type or ("float32" if backend == "cpu" else "bfloat16")]


def bytes_of_pass(config: Qwen2Config, workload: Workload, n_ids: int, context: int, backend: Backend) -> int:
    """Intermediates of n_ids that attend to at most context positions; see `activations`."""
    float_bytes = bytes_of_float(workload, backend)
    return pass_bytes(
        config,
        n_ids=n_ids,
        context=context,
        float_bytes=float_bytes,
        is_quantized=workload.kv_bits is not None,
        layer_bytes=kv_bytes_per_token(config, workload.kv_bits, float_bytes, n_ranks=workload.n_ranks)
        // config.num_hidden_layers,
        backend=backend,
    )


def weights_bytes(config: Qwen2Config, packed: Mapping[str, Packing], float_bytes: int, *, n_ranks: int = 1) -> int:
    """The weights in memory, floats in the compute type; with several ranks those of one."""
    total = 0
    for name, shape in tensor_shapes(config).items():
        packing = packed.get(name.removesuffix(".weight"))
        n_weights = math.prod(shape) // (1 if split_axis(name) is None else n_ranks)
        if packing is None:
            total += n_weights * float_bytes
        else:
            group_bytes = 2 * float_bytes if packing.is_affine else 1
            total += n_weights * packing.bits // 8 + group_bytes * (n_weights // packing.group_size)
    return total


def load_bytes(model: ModelFolder | ModelShape, float_bytes: int) -> int:
    """Floats that are cast stand in memory twice, the largest group that is read at once: a layer, or what is left."""
    if not isinstance(model, ModelFolder):
        return 0
    groups: dict[int | None, int] = {}
    for name, (_, entry) in model.checkpoint.tensors.items():
        size = entry.end - entry.start
        is_cast = entry.dtype not in ("U32", "U8") and size != math.prod(entry.shape) * float_bytes
        layer = layer_of(name)
        groups[layer] = groups.get(layer, 0) + (size if is_cast else 0)
    return max(groups.values())


def kv_bytes_per_token(config: Qwen2Config, kv_bits: int | None, float_bytes: int, *, n_ranks: int = 1) -> int:
    """Keys and values of one position in all layers, of one rank's heads.

    kv_bits: None, or bits in groups of `KV_GROUP`.
    """
    n_values = 2 * config.num_hidden_layers * config.num_key_value_heads // n_ranks * config.head_dim
    if kv_bits is None:
        return n_values * float_bytes
    return n_values * kv_bits // 8 + 2 * float_bytes * (n_values // KV_GROUP)
