"""A run as a person sees it: its text while it comes, one line of settings before it, one of results after it.

Does not: choose what goes to stdout or stderr; the commands do, and hand over the stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from qwq_mlx.generate.question_file.runner import Stand
    from qwq_mlx.generate.stream import Stream
    from qwq_mlx.trace.trace import Step, Trace

__all__ = ["batch_bar", "batch_line", "batch_progress", "prefill_progress", "settings_line", "show", "summary_line"]

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model can write escape sequences; on a terminal they are shown as symbols instead of being obeyed.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def show(steps: Iterable[Step], out: TextIO, *, is_silent: bool) -> None:
    """Write the text as it comes; on a terminal the thinking is dimmed. is_silent: only run to the end."""
    is_terminal = out.isatty()
    is_styled = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    is_dim, last = False, ""
    try:
        for step in steps:
            if is_silent or not step.text:
                continue
            text = step.text.translate(_VISIBLE) if is_terminal else step.text
            if is_styled and is_dim != (step.segment == "thinking"):
                is_dim = not is_dim
                text = (_DIM if is_dim else _PLAIN) + text
            out.write(text)
            out.flush()
            last = text
    finally:
        if is_dim:
            out.write(_PLAIN)
        if is_terminal and last and not last.endswith("\n"):
            out.write("\n")
        out.flush()


def settings_line(run: Stream) -> str:
    """One line with everything that decides the text."""
    sampling, limits, thinking = run.request.sampling, run.request.limits, run.request.thinking
    parts = [
        "greedy" if sampling.is_greedy else f"temperature {sampling.temperature:g}",
        f"top-p {sampling.top_p:g}",
        f"top-k {sampling.top_k}",
        f"min-p {sampling.min_p:g}",
        f"seed {sampling.seed}",
    ]
    parts = [parts[0], *([] if sampling.is_greedy else parts[1:])]
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier"):
        value = getattr(sampling, name)
        if value != (1.0 if name == "repetition_penalty" else 0.0):
            parts.append(f"{name.replace('_', '-')} {value:g}")
    if sampling.logit_bias:
        parts.append(f"{len(sampling.logit_bias)} logit biases")
    if sampling.order != "hf" and not sampling.is_greedy:
        parts.append(f"order {sampling.order}")
    if thinking.think_tokens is not None:
        parts.append(f"answer asked for after {thinking.think_tokens:,} tokens")
    parts.append(f"at most {limits.max_tokens:,} tokens")
    model = run.request.model
    return f"{model.name} ({model.weights}, computed in {model.compute_type}): {', '.join(parts)}"


def summary_line(trace: Trace) -> str:
    """The last line: why it stopped, tokens, rates, peak memory."""
    timings = trace.timings
    prefill = f" at {timings.prefill_tok_s:,.1f} tok/s" if timings.prefill_tok_s else ""
    decode = f" at {timings.decode_tok_s:,.1f} tok/s" if timings.decode_tok_s else ""
    return (
        f"{trace.finish_reason}: {trace.describe()}; prompt {len(trace.prompt_ids):,} tokens{prefill}, "
        f"output {len(trace.ids):,} tokens{decode}, peak memory {trace.peak_bytes / 1e9:.2f} GB"
    )


def batch_bar(stand: Stand, *, width: int = 20) -> str:
    """Where a batch stands: a bar, questions, rate and time left."""
    n_full = width * stand.n_done // stand.n_total
    rate = f", {stand.n_tokens / stand.seconds:,.1f} tok/s" if stand.n_tokens and stand.seconds > 0 else ""
    left = "" if stand.seconds_left is None else f", {_clock(stand.seconds_left)} left"
    failed = f", {stand.n_failed:,} failed" if stand.n_failed else ""
    return (
        f"[{'#' * n_full}{'.' * (width - n_full)}] {stand.n_done:,} of {stand.n_total:,} questions{failed}{rate}{left}"
    )


def batch_line(stand: Stand) -> str:
    """The question that was just answered, and where the batch stands."""
    line = stand.last or {}
    trace = line.get("trace") or {}
    what = line.get("error") or f"{trace.get('finish_reason')}, {len(trace.get('ids', ())):,} tokens"
    return f"{line.get('id')}: {what}; {batch_bar(stand)}"


def batch_progress(out: TextIO) -> Callable[[Stand], None]:
    """Shows where a batch stands: by a bar that is written over on a terminal, else by a line a question."""
    is_terminal = out.isatty()

    def progress(stand: Stand) -> None:
        if is_terminal:
            end = "\n" if stand.n_done == stand.n_total else ""
            out.write(f"\r\x1b[K{batch_bar(stand)}{end}")
        elif stand.last is not None or (stand.n_before and not stand.n_tokens):
            out.write((batch_line(stand) if stand.last else f"going on: {batch_bar(stand)}") + "\n")
        out.flush()

    return progress


def prefill_progress(out: TextIO) -> Callable[[int, int], None]:
    """Shows on a terminal how far a prompt of more than 1,024 ids is; the line is empty at the end."""

    def progress(n_done: int, n_total: int) -> None:
        if n_total > 1024:
            text = "" if n_done >= n_total else f"prefill {n_done:,} of {n_total:,} tokens"
            out.write(f"\r\x1b[K{text}")
            out.flush()

    return progress


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
