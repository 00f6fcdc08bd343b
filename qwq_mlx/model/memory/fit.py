"""Whether a run fits this machine, decided before a weight is read; and what is done when it does not.

A context that was asked for and does not fit is refused, with the arithmetic, the largest that fits and the cheapest
change. A context left open is capped to the largest that fits; the caller says so. kv_bits "auto" takes the plain cache
where the whole context fits with it, else the most bits with which it does, with prefill passes of 256 ids at most
(attention over a quantized cache is not fused, so long passes would cost what it saves).

Does not: choose a quantized cache unasked, or look at the prompt (its length does not change the plan).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qwq_mlx.errors import FitError
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.memory.advice import SMALL_STEP, cheapest_change
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED
from qwq_mlx.model.memory.plan import Backend, MemoryPlan, ModelShape, Workload, can_quantize, plan_memory
from qwq_mlx.model.split import Split
from qwq_mlx.options import Limits

__all__ = ["Fitted", "fitted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """limits: with context filled in and kv_bits a number or None. note: what was changed, "" for nothing."""

    limits: Limits
    plan: MemoryPlan
    note: str


def fitted(
    model: ModelFolder | ModelShape,
    limits: Limits,
    *,
    limit_bytes: int | None,
    backend: Backend,
    compute_type: str | None = None,
    draft: ModelShape | None = None,
    drafts_from_texts: bool = False,
    split: Split | None = None,
    rank: int = 0,
) -> Fitted:
    """The limits that this machine can keep. limit_bytes: what the device gives; None forces whatever is asked.

    compute_type: None picks by backend. draft: a draft model that is loaded beside it. drafts_from_texts:
      whether ids are guessed without one. split: who holds what, of processes that hold the model together. rank: the
      one of them whose memory binds (`splits.binding_rank`).

    Raises FitError where nothing, or not the context asked for, fits; OptionError for a context beyond the model's.
    """
    model_context = model.config.max_position_embeddings

    def planned(limits: Limits) -> MemoryPlan:
        kv_bits = None if limits.kv_bits == "auto" else limits.kv_bits
        workload = Workload(
            context=limits.context,
            kv_bits=kv_bits,
            prefill_step=limits.prefill_step,
            compute_type=compute_type,
            draft=draft,
            drafts_from_texts=drafts_from_texts,
            n_draft=MAX_DRAFTED,
            split=split,
            rank=rank,
        )
        return plan_memory(model, workload, limit_bytes=limit_bytes, backend=backend)

    limits, note = _with_bits(model, limits, backend, planned)
    plan = planned(limits)
    if plan.fits:
        return Fitted(limits=replace(limits, context=plan.context), plan=plan, note=note)
    if limits.context is not None or plan.largest_context < 2:
        change = cheapest_change(model, plan)
        machine = (
            "this machine" if rank == 0 or split is None else f"process {rank}, which holds {split.describe(rank)}"
        )
        raise FitError(
            f"A context of {plan.context:,} does not fit the memory of {machine}:\n{plan.arithmetic()}\n"
            f"The largest context that fits is {plan.largest_context:,}. The cheapest change: "
            f"{change.text if change else 'none; take a model of fewer bits or a machine with more memory'}. "
            "`force=True` tries it all the same."
        )
    capped = replace(limits, context=plan.largest_context)
    positions = f"{plan.largest_context:,} of {model_context:,} positions"
    note += f"the context is capped to {positions}, more does not fit the memory"
    return Fitted(limits=capped, plan=planned(capped), note=note)


def _with_bits(
    model: ModelFolder | ModelShape, limits: Limits, backend: Backend, planned: Callable[[Limits], MemoryPlan]
) -> tuple[Limits, str]:
    if limits.kv_bits != "auto":
        return limits, ""
    plain = replace(limits, kv_bits=None)
    if not can_quantize(model.config, backend) or planned(plain).fits:
        return plain, ""
    small = replace(plain, prefill_step=min(limits.prefill_step, SMALL_STEP))
    for bits in (8, 4):
        tried = replace(small, kv_bits=bits)
        if planned(tried).fits or bits == 4:
            break
    return tried, f"the KV cache is quantized to {bits} bits to fit the memory; "
