"""What mlx-lm (0.32.2) holds beside the weights where it does what this package does not: batches, and draft models.

Read from its source, and compared with its peaks (scripts/measure_mlx_lm_memory.py; docs/benchmarks.md has the
numbers). Planned is the case where a sequence ends while the caches of the others are full. K sequences in a
BatchGenerator, as batch_generate drives it, hold at most the larger of

    prefill     K caches, and a pass of min(K, 8) prompts at once: PROMPTS_AT_ONCE is its prefill_batch_size
    an end      2 K - 1 caches, and a decode step of K rows: when one of K sequences ends, the caches of the others are
                taken out by index into new arrays, while the response of the one that ended still leads to the old

and with either what growing holds: all layers grow by 256 positions within the graph of one pass. The CPU is through
with a layer before the next, so there it is one layer's old cache; a GPU may have queued them all. A decode
step keeps the log-probabilities of the two steps before, one for the caller, one under way.

A draft model adds its weights and its cache. Both models are prefilled one after the other, and a step that checks
n_draft ids has n_draft + 1 rows of logits, besides those of the last check. Both caches grow as above.

On a GPU MLX queues the passes of many layers, whose intermediates are held meanwhile, so there more may be held than is
planned. That is no need: with mx.set_memory_limit at the plan MLX waits for its queue where the limit is reached.

Does not: count prompts of different lengths, whose caches are rolled into place, old and new beside each other (2 K of
them; planned by held was 0.94 with two), or what a caller keeps of the caches that responses bring.
"""

from __future__ import annotations

from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.memory.activations import CACHE_STEP, logits_bytes, n_positions, sampler_bytes
from qwq_mlx.model.memory.sizes import bytes_of_float, bytes_of_pass, kv_bytes_per_token, weights_bytes
from qwq_mlx.model.memory.workload import Backend, ModelShape, Workload

__all__ = ["PROMPTS_AT_ONCE", "batch_bytes", "speculative_bytes"]

PROMPTS_AT_ONCE = 8
_STEPS_BEFORE = 2  # of a batch whose log-probabilities are still held in a step
_CHECKS_BEFORE = 1


def batch_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    """Caches and passes of workload.n_sequences, at least 2, that each fill the context."""
    n_sequences = workload.n_sequences
    cache = _cache_bytes(config, workload, context, backend)
    n_prompts = min(n_sequences, PROMPTS_AT_ONCE)
    prefill = n_sequences * cache + _growing(config, workload, n_prompts, workload.prefill_step, context, backend)
    step = _growing(config, workload, n_sequences, 1, context, backend)
    rows = n_sequences * _row_bytes(config, workload, backend, n_before=_STEPS_BEFORE)
    one_ends = (2 * n_sequences - 1) * cache + bytes_of_pass(config, workload, n_sequences, context, backend)
    return max(prefill, n_sequences * cache + step + rows, one_ends + rows)


def speculative_bytes(
    config: Qwen2Config, draft: ModelShape, workload: Workload, context: int, backend: Backend
) -> int:
    """Both caches and the draft model's weights, and the largest pass of either model."""
    draft_bytes = weights_bytes(draft.config, draft.packed, bytes_of_float(workload, backend))
    draft_bytes += sum(_cache_bytes(each, workload, context, backend) for each in (config, draft.config))
    rows = (1 + workload.n_draft) * _row_bytes(config, workload, backend, n_before=_CHECKS_BEFORE)
    return draft_bytes + max(
        _growing(config, workload, 1, workload.prefill_step, context, backend),
        _growing(draft.config, workload, 1, workload.prefill_step, context, backend),
        _growing(config, workload, 1, 1 + workload.n_draft, context, backend) + rows,
    )


def _growing(
    config: Qwen2Config, workload: Workload, n_sequences: int, n_ids: int, context: int, backend: Backend
) -> int:
    """The largest pass of n_ids in each sequence: the last, or the last one that makes the cache grow."""
    n_ids = min(n_ids, context)
    n_before = n_positions(context) - CACHE_STEP
    n_grown = min(context, n_before + n_ids)
    old = n_sequences * n_before * kv_bytes_per_token(config, workload.kv_bits, bytes_of_float(workload, backend))
    if backend == "cpu":
        old //= config.num_hidden_layers
    last, grown = (bytes_of_pass(config, workload, n_sequences * n_ids, n, backend) for n in (context, n_grown))
    return max(last, grown + old)


def _cache_bytes(config: Qwen2Config, workload: Workload, context: int, backend: Backend) -> int:
    return n_positions(context) * kv_bytes_per_token(config, workload.kv_bits, bytes_of_float(workload, backend))


def _row_bytes(config: Qwen2Config, workload: Workload, backend: Backend, *, n_before: int) -> int:
    """Logits of a row, what is made of them, and the log-probabilities of n_before rows before."""
    before = n_before * config.vocab_size * bytes_of_float(workload, backend)
    return logits_bytes(config) + sampler_bytes(config) + before
