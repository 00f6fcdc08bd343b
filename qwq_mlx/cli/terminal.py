"""A run as a person sees it: its text while it comes, one line of settings before it, one of results after it.

Does not: choose what goes to stdout or stderr; the commands do, and hand over the stream.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from qwq_mlx.generate.question_file.runner import BatchProgress
    from qwq_mlx.generate.stream import Stream
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.trace.trace import Step, Trace

__all__ = ["batch_line", "batch_progress", "prefill_progress", "settings_line", "show", "summary_line"]

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


def summary_line(trace: Trace, *, is_saved: bool = False) -> str:
    """The last line: why it stopped, tokens, rates, peak memory. is_saved: a line before has told how to go on."""
    timings = trace.timings
    prefill = f" at {timings.prefill_tok_s:,.1f} tok/s" if timings.prefill_tok_s else ""
    decode = f" at {timings.decode_tok_s:,.1f} tok/s" if timings.decode_tok_s else ""
    asked = f", {trace.asked_tokens:,} to ask for the answer" if trace.asked_tokens else ""
    why = trace.describe(is_saved=is_saved)
    return (
        f"{trace.finish_reason}: {why}; prompt {len(trace.prompt_ids):,} tokens{prefill}, "
        f"output {len(trace.ids):,} tokens{decode}{asked}, peak memory {trace.peak_bytes / 1e9:.2f} GB"
    )


@contextmanager
def batch_progress(*, is_shown: bool) -> Iterator[Callable[[BatchProgress], None]]:
    """How far a file of questions is: a bar on a terminal, else a line on stderr for every question."""
    from qwq_mlx.progress import ProgressBar

    is_terminal = sys.stderr.isatty()
    with ProgressBar(unit="question", is_shown=is_shown and is_terminal, stays=True) as bar:

        def progress(stand: BatchProgress) -> None:
            if is_terminal:
                n_done, is_begun = stand.n_done, stand.n_tokens > 0
                bar.show(
                    "answering", n_done, stand.n_total, n_before=stand.n_before, note=_cost(stand), is_begun=is_begun
                )
            elif is_shown and (stand.last is not None or (stand.n_before and not stand.n_tokens)):
                sys.stderr.write(batch_line(stand) + "\n")
                sys.stderr.flush()

        yield progress


def batch_line(stand: BatchProgress) -> str:
    """The question that was just answered, and where the batch stands."""
    what = "going on"
    if stand.last is not None:
        trace = stand.last.get("trace") or {}
        outcome = stand.last.get("error") or f"{trace.get('finish_reason')}, {len(trace.get('ids', ())):,} tokens"
        what = f"{stand.last.get('id')}: {outcome}"
    cost = f", {_cost(stand)}" if _cost(stand) else ""
    return f"{what}; {stand.n_done:,} of {stand.n_total:,} questions{cost}"


def _cost(stand: BatchProgress) -> str:
    failed = [f"{stand.n_failed:,} failed"] if stand.n_failed else []
    rate = [f"{stand.n_tokens / stand.seconds:,.1f} tok/s"] if stand.n_tokens and stand.seconds > 0 else []
    return ", ".join([*failed, *rate])


def prefill_progress(bar: ProgressBar) -> Callable[[int, int], None]:
    """Shows how far a prompt of more than 1,024 ids is; the bar is gone before the first token."""

    def progress(n_done: int, n_total: int) -> None:
        if n_done >= n_total:
            bar.clear()
        elif n_total > 1024:
            bar.show("prefill", n_done, n_total)

    return progress
