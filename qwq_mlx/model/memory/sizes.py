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
from qwq_mlx.model.split import Split
from qwq_mlx.quant.recipe import layer_of

__all__ = [
    "bytes_of_float",
    "bytes_of_pass",
    "cache_layers",
    "embedding_bytes",
    "kv_bytes_per_token",
    "layer_weights_bytes",
    "load_bytes",
    "planned_kv_bytes_per_token",
    "weights_bytes",
]


def bytes_of_float(workload: Workload, backend: Backend) -> int:
    """One number in the compute type."""
    return FLOAT_BYTES[workload.compute_type or ("float32" if backend == "cpu" else "bfloat16")]


def bytes_of_pass(
    config: Qwen2Config, workload: Workload, n_ids: int, context: int, backend: Backend, *, n_shared: int = 0
) -> int:
    """Intermediates of n_ids that attend to at most context positions; see `activations`."""
    float_bytes = bytes_of_float(workload, backend)
    return pass_bytes(
        config,
        n_ids=n_ids,
        context=context,
        float_bytes=float_bytes,
        is_quantized=workload.kv_bits is not None,
        layer_bytes=planned_kv_bytes_per_token(config, workload, backend) // cache_layers(config, workload),
        backend=backend,
        n_shared=n_shared,
    )


def weights_bytes(
    config: Qwen2Config, packed: Mapping[str, Packing], float_bytes: int, *, split: Split | None = None, rank: int = 0
) -> int:
    """The weights in memory, floats in the compute type; of a split model those of one rank."""
    return sum(
        _tensor_bytes(shape, packed.get(name.removesuffix(".weight")), float_bytes, shares=_shares(name, split))
        for name, shape in tensor_shapes(config).items()
        if split is None or split.holds(name, rank, config)
    )


def embedding_bytes(config: Qwen2Config, packed: Mapping[str, Packing], float_bytes: int) -> int:
    """The part of the weights of which a token reads a row alone; 0 where the embedding is the output matrix, too."""
    shape, packing = (config.vocab_size, config.hidden_size), packed.get("model.embed_tokens")
    return 0 if config.tie_word_embeddings else _tensor_bytes(shape, packing, float_bytes)


def layer_weights_bytes(config: Qwen2Config, packed: Mapping[str, Packing], float_bytes: int) -> list[int]:
    """The weights of each layer in memory."""
    layers = [0] * config.num_hidden_layers
    for name, shape in tensor_shapes(config).items():
        layer = layer_of(name)
        if layer is not None:
            layers[layer] += _tensor_bytes(shape, packed.get(name.removesuffix(".weight")), float_bytes)
    return layers


def _tensor_bytes(shape: tuple[int, ...], packing: Packing | None, float_bytes: int, *, shares: int = 1) -> int:
    n_weights = math.prod(shape) // shares
    if packing is None:
        return n_weights * float_bytes
    group_bytes = 2 * float_bytes if packing.is_affine else 1
    return n_weights * packing.bits // 8 + group_bytes * (n_weights // packing.group_size)


def _shares(name: str, split: Split | None) -> int:
    """Among how many ranks a tensor is divided."""
    return 1 if split is None or split.axis_of(name) is None else split.n_ranks


def load_bytes(model: ModelFolder | ModelShape, workload: Workload, backend: Backend) -> int:
    """What is held beside the weights while they are read.

    Floats that are cast stand in memory twice, the largest group that is read at once: a layer, or what is left.
    """
    if not isinstance(model, ModelFolder):
        return 0
    float_bytes = bytes_of_float(workload, backend)
    if workload.split is not None:
        return _load_bytes_of_part(model, workload.split, workload.rank, float_bytes)
    groups: dict[int | None, int] = {}
    for name, (_, entry) in model.checkpoint.tensors.items():
        size = entry.end - entry.start
        is_cast = entry.dtype not in ("U32", "U8") and size != math.prod(entry.shape) * float_bytes
        layer = layer_of(name)
        groups[layer] = groups.get(layer, 0) + (size if is_cast else 0)
    return max(groups.values())


def _load_bytes_of_part(files: ModelFolder, split: Split, rank: int, float_bytes: int) -> int:
    """Of a rank, which reads tensors one by one, the largest first (`ranks.load_part`): each stands in memory as it was
    read and as MLX has it, and where it is cast once more."""
    parts: list[tuple[int, int, int]] = []  # bytes on disk of the whole tensor, of the part, and in memory
    for name, (_, entry) in files.checkpoint.tensors.items():
        if split.holds(name, rank, files.config):
            size, shares = entry.end - entry.start, _shares(name, split)
            is_code = entry.dtype in ("U32", "U8")
            memory = size if is_code else math.prod(entry.shape) * float_bytes
            parts.append((size, size // shares, memory // shares))
    held = most = 0
    for _, read, memory in sorted(parts, reverse=True):
        most = max(most, held + read + max(read, memory) + (read if memory != read else 0))
        held += memory
    return max(0, most - held)


def cache_layers(config: Qwen2Config, workload: Workload) -> int:
    """Layers that have a cache in the process that is planned."""
    return config.num_hidden_layers if workload.split is None else workload.split.n_layers[workload.rank]


def kv_bytes_per_token(
    config: Qwen2Config, kv_bits: int | None, float_bytes: int, *, split: Split | None = None, rank: int = 0
) -> int:
    """Keys and values of one position in all layers; of a split model in those, and the heads, of one rank.

    kv_bits: None, or bits in groups of `KV_GROUP`.
    """
    n_layers, n_heads = config.num_hidden_layers, config.num_key_value_heads
    if split is not None:
        n_layers, n_heads = split.n_layers[rank], split.n_heads_of(n_heads)
    n_values = 2 * n_layers * n_heads * config.head_dim
    if kv_bits is None:
        return n_values * float_bytes
    return n_values * kv_bits // 8 + 2 * float_bytes * (n_values // KV_GROUP)


def planned_kv_bytes_per_token(config: Qwen2Config, workload: Workload, backend: Backend) -> int:
    """The same of the process that is planned."""
    float_bytes = bytes_of_float(workload, backend)
    return kv_bytes_per_token(config, workload.kv_bits, float_bytes, split=workload.split, rank=workload.rank)
