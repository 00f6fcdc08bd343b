"""Thinking as one line: what is thinking is known only when the answer begins, or at the end.

A model without thinking tags says at some point "**Final Answer**", and the first token of that, or all of a reply that
never does, was taken for thinking until then. So the tokens are kept back, and shown from where the trace says that the
thinking ended.

Does not: print (the caller is handed lines).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwq_mlx.generate.stream import Stream
    from qwq_mlx.trace.trace import Step

__all__ = ["folded"]

_EVERY = 32  # tokens between two reports


def folded(run: Stream, note: Callable[[str], None], report: Callable[[str], None]) -> Iterator[Step]:
    """The steps of the answer alone. note: told how long the thinking was, once. report: told how far it is."""
    hidden: list[Step] = []
    is_answer = False
    for step in run:
        if not is_answer and step.segment == "thinking":
            del hidden[step.index :]  # taken back
            hidden.append(step)
            if len(hidden) % _EVERY == 0:
                report(f"(thinking, {len(hidden):,} tokens)")
            continue
        if not is_answer:
            yield from _rest(run, hidden, note, report)
            is_answer = True
        yield step
    if not is_answer:
        yield from _rest(run, hidden, note, report)


def _rest(
    run: Stream, hidden: list[Step], note: Callable[[str], None], report: Callable[[str], None]
) -> Iterator[Step]:
    start, end = run.trace().thinking_span
    report("")
    n_thinking = min(end, len(hidden)) - start
    if n_thinking:
        note(f"(thought for {n_thinking:,} tokens{', no answer' if run.is_finished and end >= len(hidden) else ''})")
    yield from hidden[end:]
