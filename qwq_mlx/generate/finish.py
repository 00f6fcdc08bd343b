"""What a run leaves behind at its end: its parts put together into a Trace, and a failure of MLX in words.

Does not: see what MLX does not raise: on the CPU MLX 0.32.4 writes through the null pointer of a failed malloc, which
ends the process (a limit of address space shows it). Saving every so many tokens helps there.
"""

from __future__ import annotations

from qwq_mlx.errors import GenerationError, OutOfMemoryError
from qwq_mlx.generate.checkpoint.inspected_steps import hidden_rows
from qwq_mlx.generate.request import Request
from qwq_mlx.generate.run import Run
from qwq_mlx.model.memory.advice import lighter
from qwq_mlx.trace.timings import Timings
from qwq_mlx.trace.trace import Asked, Trace

__all__ = ["failure_of", "trace_of"]

# A model is as sure of what an unfinished thinking comes to: of the answers at 0.95 and more, asked for behind 0.5,
# 0.8 and 0.9 of outputs of the bundled model, 15 of 31, 29 of 38 and 25 of 42 were right
# (scripts/measure_asked_answers.py).
_UNFINISHED = 0.8


def failure_of(error: Exception, trace: Trace, request: Request) -> GenerationError:
    """What MLX raised in mid-run as an error that has the trace: OutOfMemoryError where an allocation failed."""
    said = f"{type(error).__name__}: {error}"
    where, kept = f"Step {len(trace.ids):,}:", "What was written until then is in the trace."
    if not OutOfMemoryError.is_meant_by(error):
        return GenerationError(f"{where} MLX could not go on ({said}). {kept}", trace=trace)
    return OutOfMemoryError(
        f"{where} memory ran out ({said}), though {request.plan.peak_bytes / 1e9:,.2f} GB were planned and there. End "
        f"what else takes memory, or start with {_less(request)}. {kept}",
        trace=trace,
    )


def _less(request: Request) -> str:
    """Flags of a run that needs less memory; only those that would be taken."""
    asked = request.plan.workload
    lighter_ones = [each for _, each in lighter(request.model.config, asked, request.plan.backend)]
    flags = ["a smaller `context`"]
    flags += [f"`prefill_step` {each.prefill_step}" for each in lighter_ones if each.kv_bits == asked.kv_bits]
    flags += [f"`kv_bits` {each.kv_bits}" for each in lighter_ones if each.kv_bits != asked.kv_bits][:1]
    return " or ".join(flags)


def trace_of(run: Run, *, timings: Timings, peak_bytes: int, asked: Asked | None = None) -> Trace:
    """Everything so far, frozen. Before the end its finish_reason is "interrupted".

    asked: what the model said behind its text; the answer where it is more probable than what the text gives.
    """
    request, injections = run.request, run.injections
    reason, detail = run.finish or ("interrupted", "the run is not over")
    split = run.output.split(is_final=run.finish is not None, is_ended=reason == "stop")
    if injections and reason in ("stop", "length"):
        cut = injections[-1]
        reason, detail = cut.reason, f"the answer was asked for after {cut.start:,} tokens" + (detail and f"; {detail}")
    text, steps, inspect = run.output.text, run.steps, request.inspect
    answer, kind, confidence = split.answer, str(split.kind), split.confidence
    if asked is not None and asked.answer is not None:
        probability = round(asked.confidence * (1.0 if reason == "stop" else _UNFINISHED), 3)
        if probability > confidence:
            answer, kind, confidence = asked.answer, "asked", probability
    return Trace(
        question=request.question,
        prompt_ids=request.prompt_ids,
        ids=tuple(step.id for step in steps),
        text=text,
        texts=tuple(step.text for step in steps),
        thinking=text[slice(*split.thinking_chars)],
        conclusion=text[slice(*split.conclusion_chars)] if split.conclusion_chars else "",
        answer=answer,
        answer_kind=kind,
        is_revised=split.is_revised,
        confidence=confidence,
        thinking_span=split.thinking,
        conclusion_span=split.conclusion,
        finish_reason=reason,
        detail=detail,
        logprobs=tuple(step.logprob for step in steps),
        entropies=tuple(step.entropy for step in steps),
        injections=tuple(injections),
        timings=timings,
        peak_bytes=peak_bytes,
        events=tuple(run.monitors.events),
        settings=request.settings,
        model={
            "name": request.model.name,
            "weights": request.model.weights,
            "compute_type": request.model.compute_type,
        },
        alternatives=tuple(step.alternatives for step in steps) if inspect.top_k else (),
        margins=tuple(step.margin for step in steps) if inspect.top_k else (),
        loop_scores=tuple(step.loop_scores for step in steps) if inspect.loop_scores else (),
        hidden={layer: hidden_rows(steps, layer, request.model.config.hidden_size) for layer in inspect.hidden_layers},
        asked=asked,
    )
