"""What `Inspect` showed of a run's steps, on its way into a checkpoint and back.

Does not: save a hook; no file can hold a function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

import mlx.core as mx
import numpy as np

from qwq_mlx.options import Inspect
from qwq_mlx.reasoning.loops.detector import LoopScores
from qwq_mlx.trace.trace import Alternative, Step

__all__ = ["hidden_rows", "inspect_of", "seen_state", "with_seen"]

_PREFIX = "hidden."


def seen_state(inspect: Inspect, steps: Sequence[Step], hidden_size: int) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """What was asked for and seen, as JSON values, and the hidden states by name; empty where nothing was asked for."""
    asked = asdict(replace(inspect, logits_hook=None))
    del asked["logits_hook"]
    rows = [
        [
            step.margin,
            [[each.id, each.text, each.logprob] for each in step.alternatives],
            None if step.loop_scores is None else list(astuple(step.loop_scores)),
        ]
        for step in steps
    ]
    arrays = {
        f"{_PREFIX}{layer}": mx.array(hidden_rows(steps, layer, hidden_size))
        for layer in inspect.hidden_layers
        if steps
    }
    is_asked = bool(inspect.top_k or inspect.hidden_layers or inspect.loop_scores or not inspect.entropy)
    return ({"asked": asked, "rows": rows} if is_asked else {}), arrays


def inspect_of(state: Mapping[str, Any]) -> Inspect:
    """What a saved run was asked to show."""
    asked = state.get("asked")
    return Inspect() if asked is None else Inspect(**{**asked, "hidden_layers": tuple(asked["hidden_layers"])})


def with_seen(steps: Sequence[Step], state: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> list[Step]:
    """The steps with what a checkpoint has of them. arrays: all of the file."""
    hidden = {int(name[len(_PREFIX) :]): np.array(each) for name, each in arrays.items() if name.startswith(_PREFIX)}
    filled = []
    for step, (margin, top, scores) in zip(steps, state.get("rows", ()), strict=False):
        names = ("cycle", "variants", "candidate", "doubts")
        filled.append(
            replace(
                step,
                alternatives=tuple(Alternative(id=each, text=text, logprob=value) for each, text, value in top),
                margin=margin,
                loop_scores=None if scores is None else LoopScores(**dict(zip(names, scores, strict=True))),
                hidden={} if step.is_injected else {layer: rows[step.index] for layer, rows in hidden.items()},
            )
        )
    return filled or list(steps)


def hidden_rows(steps: Sequence[Step], layer: int, hidden_size: int) -> Any:
    """One layer's hidden states (steps, hidden_size) float32, NaN where nothing was seen."""
    rows = np.full((len(steps), hidden_size), np.nan, np.float32)
    for step in steps:
        if layer in step.hidden:
            rows[step.index] = step.hidden[layer]
    return rows
