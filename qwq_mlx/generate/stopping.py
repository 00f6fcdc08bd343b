"""How a run ends and what it leaves behind: its limits, its parts put together into a Trace, a failure in words.

Does not: see what MLX does not raise: on the CPU MLX 0.32.4 writes through the null pointer of a failed malloc, which
ends the process (a limit of address space shows it). --save-every helps there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwq_mlx.errors import GenerationError, OutOfMemoryError
from qwq_mlx.generate.checkpoint.inspected_steps import hidden_rows
from qwq_mlx.generate.output import Written
from qwq_mlx.generate.request import Setup, given
from qwq_mlx.model.memory.advice import lighter
from qwq_mlx.trace.trace import FinishReason, Injection, Timings, Trace

__all__ = ["end_after", "failure_of", "trace_of"]


def end_after(
    setup: Setup, n_output: int, *, injections: Sequence[Injection], is_stopped: bool
) -> tuple[FinishReason, str] | None:
    """Why a run ends after its n_output-th token, with the detail for people; None where it goes on.

    injections: answer cues so far. is_stopped: somebody asked for the end.
    """
    limits, answer_tokens = setup.limits, setup.thinking.answer_tokens
    if is_stopped:
        return "interrupted", ""
    n_used, context = len(setup.prompt_ids) + n_output, given(limits.context)
    if n_used >= context:
        return "context_full", f"{n_used:,} of {context:,} positions"
    if n_output >= given(limits.max_tokens):
        return "length", f"{n_output:,} tokens"
    if injections and n_output - injections[-1].end >= answer_tokens:
        return "length", f"the answer was cut at {answer_tokens:,} tokens"
    return None


def failure_of(error: Exception, trace: Trace, setup: Setup) -> GenerationError:
    """What MLX raised in mid-run as an error that has the trace: OutOfMemoryError where an allocation failed."""
    said = f"{type(error).__name__}: {error}"
    where, kept = f"Step {len(trace.ids):,}:", "What was written until then is in the trace."
    if not OutOfMemoryError.is_meant_by(error):
        return GenerationError(f"{where} MLX could not go on ({said}). {kept}", trace=trace)
    return OutOfMemoryError(
        f"{where} memory ran out ({said}), though {setup.plan.peak_bytes / 1e9:,.2f} GB were planned and there. End "
        f"what else takes memory, or start with {_less(setup)}. {kept}",
        trace=trace,
    )


def _less(setup: Setup) -> str:
    """Flags of a run that needs less memory; only those that would be taken."""
    asked = setup.plan.workload
    lighter_ones = [each for _, each in lighter(setup.model.config, asked, setup.plan.backend)]
    flags = ["a smaller --context"]
    flags += [f"--prefill-step {each.prefill_step}" for each in lighter_ones if each.kv_bits == asked.kv_bits]
    flags += [f"--kv-bits {each.kv_bits}" for each in lighter_ones if each.kv_bits != asked.kv_bits][:1]
    return " or ".join(flags)


def trace_of(
    setup: Setup,
    written: Written,
    finish: tuple[FinishReason, str] | None,
    *,
    injections: Sequence[Injection],
    events: Sequence[Mapping[str, Any]],
    timings: Timings,
    peak_bytes: int,
) -> Trace:
    """Everything so far, frozen. finish: None before the end; the Trace's finish_reason is then "interrupted"."""
    reason, detail = finish or ("interrupted", "the run is not over")
    split = written.split(is_final=finish is not None, is_ended=reason == "stop")
    if injections and reason in ("stop", "length"):
        cut = injections[-1]
        reason, detail = cut.reason, f"the answer was asked for after {cut.start:,} tokens" + (detail and f"; {detail}")
    text, steps, inspect = written.text, written.steps, setup.inspect
    return Trace(
        question=setup.question,
        prompt_ids=setup.prompt_ids,
        ids=tuple(step.id for step in steps),
        text=text,
        texts=tuple(step.text for step in steps),
        thinking=text[slice(*split.thinking_chars)],
        conclusion=text[slice(*split.conclusion_chars)] if split.conclusion_chars else "",
        answer=split.answer,
        answer_kind=split.kind,
        is_revised=split.is_revised,
        confidence=split.confidence,
        thinking_span=split.thinking,
        conclusion_span=split.conclusion,
        finish_reason=reason,
        detail=detail,
        logprobs=tuple(step.logprob for step in steps),
        entropies=tuple(step.entropy for step in steps),
        injections=tuple(injections),
        timings=timings,
        peak_bytes=peak_bytes,
        events=tuple(events),
        settings=setup.settings,
        model={
            "name": setup.model.name,
            "weights": setup.model.weights,
            "compute_type": setup.model.compute_type,
        },
        alternatives=tuple(step.alternatives for step in steps) if inspect.top_k else (),
        margins=tuple(step.margin for step in steps) if inspect.top_k else (),
        loop_scores=tuple(step.loop_scores for step in steps) if inspect.loop_scores else (),
        hidden={layer: hidden_rows(steps, layer, setup.model.config.hidden_size) for layer in inspect.hidden_layers},
    )
