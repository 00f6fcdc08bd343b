"""Folded thinking: one line for it, and nothing of the answer lost, wherever the answer turns out to begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.chat.folding import folded


class Told:
    """Stands for a run: steps with the segment they were thought to be in, and the trace as it is known then."""

    def __init__(self, segments: str, span: tuple[int, int]) -> None:
        names = {"t": "thinking", "a": "answer"}
        self.steps = [SimpleNamespace(index=i, text=str(i), segment=names[s]) for i, s in enumerate(segments)]
        self.is_finished = False
        self._span = span

    def __iter__(self) -> Any:
        for step in self.steps:
            self.is_finished = step is self.steps[-1]
            yield step

    def trace(self) -> Any:
        return SimpleNamespace(thinking_span=self._span)


@pytest.mark.parametrize(
    ("segments", "span", "shown", "notes"),
    [
        ("tttaa", (0, 3), "34", ["(thought for 3 tokens)"]),
        ("tttaa", (0, 2), "234", ["(thought for 2 tokens)"]),  # the first token of the mark came as thinking
        ("ttt", (0, 0), "012", []),  # no mark ever came: all of it is the answer
        ("ttt", (0, 3), "", ["(thought for 3 tokens, no answer)"]),
        ("aa", (0, 0), "01", []),
    ],
)
def test_the_answer_is_shown_from_where_the_trace_says(
    segments: str, span: tuple[int, int], shown: str, notes: list[str]
) -> None:
    told: list[str] = []
    reports: list[str] = []
    run: Any = Told(segments, span)
    assert "".join(step.text for step in folded(run, told.append, reports.append)) == shown
    assert told == notes


def test_long_thinking_tells_how_far_it_is_and_what_was_taken_back_is_forgotten() -> None:
    reports: list[str] = []
    notes: list[str] = []
    run: Any = Told("t" * 70 + "a", (0, 40))
    run.steps[41:60] = []
    for index, step in enumerate(run.steps[30:], start=20):
        step.index = index  # from 20 on they are drawn again
    assert [step.text for step in folded(run, notes.append, reports.append)] == ["69", "70"]
    assert reports == ["(thinking, 32 tokens)", ""] and notes == ["(thought for 40 tokens)"]
