"""What a pass of S ids holds beside weights and cache: the intermediates that are alive at once, in bytes.

A pass is evaluated layer by layer, so what is alive belongs to one layer: left to itself MLX queues many, and on an
H100 passes of 2,048 ids of the 32B held 10 GB (now 0.34). With H hidden, I intermediate, K the width of one layer's
keys, C the context:

    fused       3 S I + 9 S H, for attention never holds scores; on an H100 3 S I + 3 S H were measured, the rest is
                room for Metal, which frees later (not measured on Metal). On CUDA a pass of more than `MAX_FEW_ROWS`
                ids unpacks the matrices of its layer; a model that is not packed is planned so, too
    not fused   (CPU backend, or a quantized cache) the scores of every head, id and position once, for mask, softmax
                and scores share one buffer; their mask, a byte each; 2 S I, for swiglu writes over its gate; 13 S H, of
                which 7.5 are float32 whatever the compute type (rotary embedding), as are the angles of one head,
                twice, and, where the compute type is another, S K
    float32     on the CPU linear layers multiply by BLAS one after another, so attention's share (scores, mask,
                8.8 S H, 5.6 S K, or 7.2 of a quantized cache) and the MLP's (3 S I, 2 S H) are not alive together.
                MLX's worker frees a little sooner or later from run to run: these are the largest that were seen, the
                smallest are 0.83 of them
    quantized   all the room of the cache is seen, whole blocks of positions. On Metal scores are counted 1.5 times,
                which is a guess
    growth      before a pass, a layer's old keys, or values, beside the new ones: half a layer's cache

The factors for the CPU come from doubling each size in turn (MLX 0.32.4, 4 to 8 heads, 1 to 4 key heads, 64 to 256
ids, 256 to 4,096 positions, float32 and bfloat16) and reading what grew.

Does not: count weights or cache (`plan` does).
"""

from __future__ import annotations

from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.memory.workload import Backend

__all__ = [
    "CACHE_STEP",
    "MAX_FEW_ROWS",
    "MIN_BLAS_ROWS",
    "logits_bytes",
    "n_positions",
    "pass_bytes",
    "sampler_bytes",
    "unpacked_bytes",
]

CACHE_STEP = 256
"""A cache grows by so many positions, as mlx_lm's do."""
MIN_BLAS_ROWS = 8
"""Rows from which linear layers of float32 on the CPU use BLAS: unpacking a matrix costs about one row of MLX's."""
MAX_FEW_ROWS = 32
"""Rows that the kernels for CUDA multiply at most; more are multiplied with matrices that are unpacked for them."""
_LOGIT_COPIES = 2  # as the head gives them, and in float32
_SAMPLER_COPIES = 6  # float32 rows: tempered, ordered with their ids, summed, kept, and those of the statistics
_ROTARY_BYTES = 4  # the rotary embedding is worked out in float32


def n_positions(context: int) -> int:
    """Positions that a cache has room for when it holds this many."""
    return -(-context // CACHE_STEP) * CACHE_STEP


def logits_bytes(config: Qwen2Config) -> int:
    """Logits of one position."""
    return _LOGIT_COPIES * config.vocab_size * 4


def sampler_bytes(config: Qwen2Config) -> int:
    """What drawing one id holds beside its logits; top-p without top-k, which sorts all ids, holds four rows more."""
    return _SAMPLER_COPIES * config.vocab_size * 4


def unpacked_bytes(config: Qwen2Config, float_bytes: int) -> int:
    """The matrices of one layer, unpacked."""
    width = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return config.hidden_size * (2 * width + 3 * config.intermediate_size) * float_bytes


def pass_bytes(
    config: Qwen2Config,
    *,
    n_ids: int,
    context: int,
    float_bytes: int,
    is_quantized: bool,
    layer_bytes: int,
    backend: Backend,
    n_shared: int = 0,
) -> int:
    """Intermediates of n_ids that attend to at most context positions.

    float_bytes: of the compute type. layer_bytes: one layer's keys and values of one position. n_shared: leading
    positions that lie in arrays of their own, which never grow.
    """
    if backend == "cpu" or is_quantized:
        n_seen = n_positions(context) if is_quantized else context  # attention reads all the room of such a cache
        held = _unfused_bytes(config, n_ids, n_seen, float_bytes, backend, is_quantized=is_quantized)
    else:
        held = (3 * n_ids * config.intermediate_size + 9 * n_ids * config.hidden_size) * float_bytes
    if backend == "cuda" and n_ids > MAX_FEW_ROWS:
        held += unpacked_bytes(config, float_bytes)
    n_before_growth = max(0, n_positions(context) - CACHE_STEP - n_shared)
    return max(held, n_before_growth * layer_bytes // 2)  # keys grow, then values, before a pass


def _unfused_bytes(
    config: Qwen2Config, n_ids: int, n_seen: int, float_bytes: int, backend: Backend, *, is_quantized: bool
) -> int:
    scores = config.num_attention_heads * n_ids * n_seen * float_bytes
    if backend == "metal":
        scores = scores * 3 // 2
    width = config.num_key_value_heads * config.head_dim
    mask = n_ids * n_seen
    if backend == "cpu" and float_bytes == _ROTARY_BYTES and n_ids >= MIN_BLAS_ROWS:
        keys = (7.2 if is_quantized else 5.6) * width
        attention = scores + mask + int(n_ids * (8.8 * config.hidden_size + keys)) * float_bytes
        return max(attention, n_ids * (3 * config.intermediate_size + 2 * config.hidden_size) * float_bytes)
    hidden = int(n_ids * config.hidden_size * (5.5 * float_bytes + 7.5 * _ROTARY_BYTES))
    angles = 2 * n_ids * config.head_dim * _ROTARY_BYTES
    keys = n_ids * width * _ROTARY_BYTES if float_bytes != _ROTARY_BYTES else 0
    gate = 2 * n_ids * config.intermediate_size * float_bytes
    return scores + mask + hidden + angles + keys + gate
