"""The cheapest change that makes a run fit, and what each size of Mac can hold.

Changes are tried in the order of what they cost: smaller prefill passes (some speed, once), a quantized cache (some
quality; with small passes, since its attention is not fused), a shorter context (the end of long traces).

Does not: apply anything, or promise quality.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.memory.plan import (
    Backend,
    MemoryPlan,
    ModelShape,
    Workload,
    can_quantize,
    metal_limit_bytes,
    plan_memory,
)

__all__ = ["MACS_GIB", "SMALL_STEP", "Change", "cheapest_change", "lighter", "table_of_macs"]

MACS_GIB = (16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
SMALL_STEP = 256
"""Prompt ids per pass where memory is short; unfused attention holds scores for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A workload that fits, and in words how it differs from the one asked for."""

    text: str
    plan: MemoryPlan


def cheapest_change(model: ModelShape | ModelFolder, plan: MemoryPlan) -> Change | None:
    """The first change after which the plan fits its limit; None where it fits already, or nothing helps."""
    if plan.fits:
        return None
    candidates = lighter(model.config, plan.workload, plan.backend)
    if plan.largest_context > 0:
        shorter = replace(plan.workload, context=plan.largest_context)
        candidates.append((f"a context of {plan.largest_context:,}", shorter))
    for text, workload in candidates:
        tried = plan_memory(
            model, workload, limit_bytes=plan.limit_bytes, reserve_bytes=plan.reserve_bytes, backend=plan.backend
        )
        if tried.fits:
            return Change(text=text, plan=tried)
    return None


def lighter(config: Qwen2Config, asked: Workload, backend: Backend) -> list[tuple[str, Workload]]:
    """Workloads of the same context that need less and are not refused, the cheapest first, each with its text."""
    step = min(SMALL_STEP, asked.prefill_step)
    workloads = []
    if step < asked.prefill_step:
        workloads.append((f"prefill passes of {step} ids", replace(asked, prefill_step=step)))
    configs = [config] if asked.draft is None else [config, asked.draft.config]
    has_quantized = asked.n_sequences == 1 and all(can_quantize(each, backend) for each in configs)
    for bits in (8, 4) if has_quantized else ():
        if asked.kv_bits is None or bits < asked.kv_bits:
            text = f"{bits}-bit cache, prefill passes of {step} ids"
            workloads.append((text, replace(asked, prefill_step=step, kv_bits=bits)))
    return workloads


def table_of_macs(
    model: ModelShape | ModelFolder, workload: Workload, *, reserve_bytes: int
) -> list[tuple[int, MemoryPlan]]:
    """A plan for every size of memory that Macs are sold with, in GiB."""
    return [
        (gib, plan_memory(model, workload, limit_bytes=metal_limit_bytes(gib << 30), reserve_bytes=reserve_bytes))
        for gib in MACS_GIB
    ]
