"""What `Inspect` showed of a run's steps, on its way into a saved run and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from qwq_mlx.generate.checkpoint.state import InspectedSteps
from qwq_mlx.options import Inspect
from qwq_mlx.reasoning.loops import LoopScores
from qwq_mlx.trace.trace import Alternative, Step

__all__ = ["HIDDEN", "hidden_rows", "inspected_steps", "with_inspected"]

_SCORES = tuple(each.name for each in fields(LoopScores))

HIDDEN = "hidden."
"""What the names of hidden states in a saved run begin with, before the layer's number."""


def inspected_steps(
    inspect: Inspect, steps: Sequence[Step], hidden_size: int
) -> tuple[InspectedSteps | None, dict[str, mx.array]]:
    """What was asked for and seen, None where nothing was, and the hidden states by name."""
    rows = tuple(
        (
            step.margin,
            tuple((each.id, each.text, each.logprob) for each in step.alternatives),
            None if step.loop_scores is None else astuple(step.loop_scores),
        )
        for step in steps
    )
    arrays = {
        f"{HIDDEN}{layer}": mx.array(hidden_rows(steps, layer, hidden_size)) for layer in inspect.hidden_layers if steps
    }
    return (None if inspect == Inspect() else InspectedSteps(asked=inspect, rows=rows)), arrays


def with_inspected(steps: Sequence[Step], seen: InspectedSteps | None, arrays: Mapping[str, mx.array]) -> list[Step]:
    """The steps with what a saved run has of them. arrays: all of the file."""
    if seen is None:
        return list(steps)
    hidden = {int(name[len(HIDDEN) :]): np.array(each) for name, each in arrays.items() if name.startswith(HIDDEN)}
    return [
        replace(
            step,
            alternatives=tuple(Alternative(id=token_id, text=text, logprob=value) for token_id, text, value in top),
            margin=margin,
            loop_scores=None if scores is None else LoopScores(**dict(zip(_SCORES, scores, strict=True))),
            hidden={} if step.is_injected else {layer: rows[step.index] for layer, rows in hidden.items()},
        )
        for step, (margin, top, scores) in zip(steps, seen.rows, strict=False)
    ]


def hidden_rows(steps: Sequence[Step], layer: int, hidden_size: int) -> Any:
    """One layer's hidden states (steps, hidden_size) float32, NaN where nothing was seen."""
    rows = np.full((len(steps), hidden_size), np.nan, np.float32)
    for step in steps:
        if layer in step.hidden:
            rows[step.index] = step.hidden[layer]
    return rows
