"""Whether a run fits this machine, decided before a weight is read; and what is done when it does not.

A context that was asked for and does not fit is refused, with the arithmetic, the largest that fits and the cheapest
change. A context left open is capped to the largest that fits; the caller says so. kv_bits "auto" takes the plain cache
where the whole context fits with it, else the most bits with which it does, with prefill passes of 256 ids at most
(attention over a quantized cache is not fused, so long passes would cost what it saves).

Does not: choose a quantized cache unasked, or look at the prompt (its length does not change the plan).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwq_mlx.errors import FitError
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.memory.advice import SMALL_STEP, cheapest_change
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED
from qwq_mlx.model.memory.plan import Backend, MemoryPlan, ModelShape, Workload, can_quantize, plan_memory
from qwq_mlx.model.memory.splits import binding_rank, plan_ranks, tightest_plan
from qwq_mlx.model.split import Split
from qwq_mlx.options import Limits

__all__ = ["Fitted", "fitted", "machine_of"]


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
    of_ranks: Sequence[int | None] = (),
) -> Fitted:
    """The limits that this machine can keep. limit_bytes: what the device gives; None forces whatever is asked.

    compute_type: None picks by backend. draft: a draft model that is loaded beside it. drafts_from_texts:
      whether ids are guessed without one. split: who holds what, of processes that hold the model together; then
      of_ranks, what the device of each gives, takes the place of limit_bytes, and the one that binds decides.

    Raises FitError where nothing, or not the context asked for, fits; OptionError for a context beyond the model's.
    """
    asked = Workload(
        compute_type=compute_type,
        draft=draft,
        drafts_from_texts=drafts_from_texts,
        n_draft=MAX_DRAFTED,
        split=split,
    )
    if split is None:
        return _fitted(model, limits, asked, limit_bytes, backend)
    fitting = limits
    for _ in range(2 if limits.kv_bits == "auto" else 1):  # with a cache quantized to fit another process may bind
        workload = _with_limits(asked, replace(fitting, context=limits.context))
        plans = plan_ranks(model, workload, split, of_ranks, backend=backend)
        is_known = limits.context is not None and tightest_plan(plans).fits  # without looking for the longest context
        rank = tightest_plan(plans).workload.rank if is_known else binding_rank(plans)
        found = _fitted(model, limits, replace(asked, rank=rank), of_ranks[rank], backend)
        fitting = found.limits
    return found


def _with_limits(workload: Workload, limits: Limits) -> Workload:
    return replace(
        workload,
        context=limits.context,
        kv_bits=None if limits.kv_bits == "auto" else limits.kv_bits,
        prefill_step=limits.prefill_step,
    )


def _fitted(
    model: ModelFolder | ModelShape, limits: Limits, asked: Workload, limit_bytes: int | None, backend: Backend
) -> Fitted:
    """For one process. asked: but for the limits."""

    def planned(limits: Limits) -> MemoryPlan:
        return plan_memory(model, _with_limits(asked, limits), limit_bytes=limit_bytes, backend=backend)

    limits, note = _with_bits(model, limits, backend, planned)
    plan = planned(limits)
    if plan.fits:
        return Fitted(limits=replace(limits, context=plan.context), plan=plan, note=note)
    if limits.context is not None or plan.largest_context < 2:
        change = cheapest_change(model, plan)
        raise FitError(
            f"A context of {plan.context:,} does not fit the memory of {machine_of(asked)}:\n{plan.arithmetic()}\n"
            f"The largest context that fits is {plan.largest_context:,}. The cheapest change: "
            f"{change.text if change else 'none; take a model of fewer bits or a machine with more memory'}. "
            "`force=True` tries it all the same."
        )
    capped = replace(limits, context=plan.largest_context)
    positions = f"{plan.largest_context:,} of {model.config.max_position_embeddings:,} positions"
    note += f"the context is capped to {positions}, more does not fit the memory"
    return Fitted(limits=capped, plan=planned(capped), note=note)


def machine_of(workload: Workload) -> str:
    """Whose memory is planned, for people."""
    split, rank = workload.split, workload.rank
    return "this machine" if split is None or rank == 0 else f"process {rank}, which holds {split.describe(rank)}"


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
