"""What rows that are decoded side by side hold beside the weights, and what mlx-lm (0.32.2) holds with a draft model.

Rows: each has its own cache, a newcomer is prefilled alone, and a decode step is one pass of a row's id each, with the
logits of every row and what drawing makes of them. On a GPU rows attend in batches; when those change, one layer's keys
of all rows are held twice, then its values. On the CPU `MIN_BLAS_ROWS` and more do so.

Rows that begin alike (the samples of a vote) hold their beginning once, which is read before any of them begins. Where
they do not attend in a batch, a pass copies one layer of it for each row. On the CPU a row is begun as soon as it is
built, so only the copies of rows that are under way are held; on a GPU those of all rows are planned.

A draft model is planned as mlx-lm uses one, read from its source and compared with its peaks
(scripts/measure_batch_memory.py; docs/benchmarks.md has the numbers). It adds its weights and its cache. Both models
are prefilled one after the other, and a step that checks n_draft ids has n_draft + 1 rows of logits, besides those of
the last check. All layers of a cache grow by 256 positions within the graph of one pass. The CPU is through with a
layer before the next, so there it is one layer's old cache; a GPU may have queued them all.

On a GPU MLX queues the passes of many layers, whose intermediates are held meanwhile, so there more may be held than is
planned. That is no need: with mx.set_memory_limit at the plan MLX waits for its queue where the limit is reached.

Does not: find out what rows could share (who asks says it).
"""

from __future__ import annotations

from dataclasses import replace

from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.memory.activations import (
    CACHE_STEP,
    MAX_FEW_ROWS,
    MIN_BLAS_ROWS,
    logits_bytes,
    n_positions,
    sampler_bytes,
    unpacked_bytes,
)
from qwq_mlx.model.memory.sizes import (
    bytes_of_float,
    bytes_of_pass,
    cache_layers,
    planned_kv_bytes_per_token,
    weights_bytes,
)
from qwq_mlx.model.memory.workload import Backend, ModelShape, Workload

__all__ = ["MAX_DRAFTED", "batch_bytes", "drafted_bytes", "speculative_bytes"]

MAX_DRAFTED = 15
"""Ids that this package drafts for a row at a time, at most."""

_COPIES_UNDER_WAY = 5  # of what rows share, on the CPU: MLX lets ten operations wait, of which a row has two before it
_QUANTIZED_COPIES_UNDER_WAY = 2  # attends, and a quantized one six
_CHECKS_BEFORE = 1  # of a draft, whose log-probabilities are still held in a step


def batch_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    """Caches and passes of workload.n_sequences that each fill the context."""
    most = _side_by_side_bytes(config, workload, context, backend)
    if backend == "cpu" and _is_batched(workload, backend):  # when some have ended, the others attend one by one
        fewer = replace(workload, n_sequences=MIN_BLAS_ROWS - 1)
        most = max(most, _side_by_side_bytes(config, fewer, context, backend))
    return most


def _side_by_side_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    n_sequences, n_shared = workload.n_sequences, workload.n_shared
    step = bytes_of_pass(config, workload, n_sequences, context, backend, n_shared=n_shared)
    step += _more_unpacked_bytes(config, workload, backend)
    drawing = n_sequences * (logits_bytes(config) + sampler_bytes(config)) if workload.rank == 0 else 0
    is_batched = _is_batched(workload, backend)
    if n_shared and not is_batched:  # no layer attends any more when the logits are there
        drawing = max(drawing, _copies_bytes(config, workload, context, backend))
    step += drawing
    if n_shared and is_batched:  # scores, before the softmax and behind it
        scores = config.num_attention_heads * n_sequences * context * bytes_of_float(workload, backend)
        step = max(step, 3 * scores)
    per_token = planned_kv_bytes_per_token(config, workload, backend)
    own = n_sequences * max(0, n_positions(context) - n_shared) * per_token
    regrouped = own // (2 * cache_layers(config, workload)) if is_batched else 0
    n_read = n_shared or context
    prefill = bytes_of_pass(config, workload, min(workload.prefill_step, n_read), n_read, backend)
    if not n_shared:
        return own + max(prefill, step, regrouped)
    # who reads them has more room than positions; the rows share arrays of just these
    return max(
        _cache_bytes(config, workload, n_shared, backend) + prefill, n_shared * per_token + own + max(step, regrouped)
    )


def _more_unpacked_bytes(config: Qwen2Config, workload: Workload, backend: Backend) -> int:
    """What a step on CUDA unpacks more than a pass of an id of each row: a layer for drafts that are checked with them,
    or the output matrix, which is larger; an embedding that is one, too, is multiplied as it is packed."""
    is_drafting = workload.draft is not None or workload.drafts_from_texts
    n_rows = workload.n_sequences * (1 + (workload.n_draft if is_drafting else 0))
    if backend != "cuda" or n_rows <= MAX_FEW_ROWS:
        return 0
    float_bytes = bytes_of_float(workload, backend)
    layer, head = unpacked_bytes(config, float_bytes), config.hidden_size * config.vocab_size * float_bytes
    has_head = workload.rank == 0 and not config.tie_word_embeddings
    planned = layer if workload.n_sequences > MAX_FEW_ROWS else 0
    return max(layer, head if has_head else 0) - planned


def _copies_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    """Whole keys and values of a layer of rows that attend one by one behind what they share."""
    layer_bytes = planned_kv_bytes_per_token(config, workload, backend) // cache_layers(config, workload)
    is_quantized = workload.kv_bits is not None
    n_copies = workload.n_sequences
    if backend == "cpu":
        n_copies = min(n_copies, _QUANTIZED_COPIES_UNDER_WAY if is_quantized else _COPIES_UNDER_WAY)
    return n_copies * (n_positions(context) if is_quantized else context) * layer_bytes


def _is_batched(workload: Workload, backend: Backend) -> bool:
    """Whether all rows attend in a batch: see `engine.model_runner.batches_from`."""
    if workload.kv_bits is not None:
        return False
    is_float32 = bytes_of_float(workload, backend) == 4
    return backend != "cpu" or (is_float32 and workload.n_sequences >= MIN_BLAS_ROWS)


def speculative_bytes(
    config: Qwen2Config, draft: ModelShape, workload: Workload, context: int, backend: Backend
) -> int:
    """Both caches and the draft model's weights, and the largest pass of either model.

    Of several sequences each has a cache in both models, and drafts in the pass that they share.
    """
    draft_bytes = weights_bytes(draft.config, draft.packed, bytes_of_float(workload, backend))
    whole = replace(workload, split=None, rank=0)  # a draft model is not split
    if workload.n_sequences > 1:
        both = batch_bytes(config, workload, context, backend) + drafted_bytes(config, workload)
        return draft_bytes + both + workload.n_sequences * _cache_bytes(draft.config, whole, context, backend)
    draft_bytes += _cache_bytes(config, workload, context, backend)
    draft_bytes += _cache_bytes(draft.config, whole, context, backend)
    rows = (1 + workload.n_draft) * _row_bytes(config, workload, backend)
    return draft_bytes + max(
        _growing(config, workload, workload.prefill_step, context, backend),
        _growing(draft.config, whole, workload.prefill_step, context, backend),
        _growing(config, workload, 1 + workload.n_draft, context, backend) + rows,
    )


def drafted_bytes(config: Qwen2Config, workload: Workload) -> int:
    """Logits of all drafted ids, and what drawing makes of them: all are drawn at once."""
    return workload.n_sequences * workload.n_draft * (logits_bytes(config) + sampler_bytes(config))


def _growing(config: Qwen2Config, workload: Workload, n_ids: int, context: int, backend: Backend) -> int:
    """The largest pass of n_ids: the last, or the last one that makes the cache grow."""
    n_ids = min(n_ids, context)
    n_before = n_positions(context) - CACHE_STEP
    n_grown = min(context, n_before + n_ids)
    old = n_before * planned_kv_bytes_per_token(config, workload, backend)
    if backend == "cpu":
        old //= cache_layers(config, workload)
    last, grown = (bytes_of_pass(config, workload, n_ids, n, backend) for n in (context, n_grown))
    return max(last, grown + old)


def _cache_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    return n_positions(context) * planned_kv_bytes_per_token(config, workload, backend)


def _row_bytes(config: Qwen2Config, workload: Workload, backend: Backend) -> int:
    """Logits of a row, what is made of them, and the log-probabilities of the checks before."""
    before = _CHECKS_BEFORE * config.vocab_size * bytes_of_float(workload, backend)
    return logits_bytes(config) + sampler_bytes(config) + before
