"""What a saved run needs before it goes on: the same model, room, and an end that can be taken back.

A run that ended without an answer can be asked for it later. The id that ended its text is taken off, or the last
tokens of a full context, and the answer cue stands in their place.

Does not: read files, or run anything (`reasoner` and `run` do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.generate.checkpoint.schema import check_arrays, check_form
from qwq_mlx.generate.request import given
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.options import Inspect, Limits

__all__ = ["check_saved", "opened", "raised", "with_room", "within"]

_GOES_ON = (None, "interrupted", "length", "context_full")


def check_saved(
    state: Any, arrays: Mapping[str, Any], model: LoadedModel, inspect: Inspect | None, *, path: Path
) -> None:
    """Raises SourceError where the file holds no run (see `saved`), or one of another model or type; OptionError where
    its logits_hook is missing."""
    check_form(state, path=path)
    if state["model_sha256"] != model_digest(model.folder):
        raise SourceError(
            f"{path}: was saved with another model than {model.folder} (their digests differ). "
            "Give the folder that the run was started with."
        )
    if state["compute_type"] != model.compute_type:
        raise SourceError(
            f"{path}: was computed in {state['compute_type']}, this model computes in {model.compute_type}. "
            f"Load it with compute_type={state['compute_type']!r}."
        )
    if state["settings"].get("logits_hook") and (inspect is None or inspect.logits_hook is None):
        raise OptionError(
            f"{path}: the run had a logits_hook, which no file can hold. Give it again: "
            "resume(..., inspect=Inspect(logits_hook=...))."
        )
    check_arrays(state, arrays, model, path=path)


def opened(state: dict[str, Any], model: LoadedModel, *, path: Path, answer_now: bool) -> dict[str, Any]:
    """The state to go on from. answer_now: without the id that ended the text, if one did.

    Raises SourceError where the run has ended and is not asked for its answer; OptionError where it cannot be.
    """
    reason, steps = state["finish_reason"], state["steps"]
    if not answer_now:
        if reason not in _GOES_ON:
            raise SourceError(
                f"{path}: the run has ended ({reason}), so there is nothing to resume. If it has no answer, "
                "--answer-now (answer_now=True) asks for it."
            )
        return state
    if state["injections"]:
        raise OptionError(f"answer_now: {path} was asked for its answer already. Start another run.")
    if reason != "stop":
        return state
    if steps[-1][0] not in model.stop_ids:
        raise OptionError(f"answer_now: {path} ended with a stop text, so it would end at once. Start another run.")
    return {**state, "steps": steps[:-1]}


def raised(limits: Limits, state: dict[str, Any], *, max_tokens: int | None, context: int | None) -> Limits:
    """A saved run's limits with those that were given; what the old context alone had bounded grows with it."""
    n_prompt = len(state["prompt_ids"])
    if max_tokens is None and limits.max_tokens != given(limits.context) - n_prompt:
        max_tokens = limits.max_tokens
    return within(replace(limits, max_tokens=max_tokens, context=context or limits.context), n_prompt)


def with_room(state: dict[str, Any], limits: Limits, *, n_cue: int, answer_tokens: int) -> dict[str, Any]:
    """The state, checked for room to go on. n_cue: ids of an answer cue that comes first, 0 for none.

    Where the context was full and a cue comes, the last tokens make room for it and for the answer: `answer_tokens`,
    but a quarter of the output at most. Raises OptionError where there is no room.
    """
    n_most, steps = given(limits.max_tokens), state["steps"]
    if n_cue and state["finish_reason"] == "context_full":
        n_answer = min(answer_tokens, n_most // 4) + 1  # one more, so that the answer's own limit ends it
        steps = steps[: max(0, n_most - n_cue - n_answer)]
    n_output = len(steps)
    n_known = len(state["prompt_ids"]) + n_output
    if given(limits.context) <= n_known:
        raise OptionError(
            f"context is {limits.context:,}, but the run has {n_known:,} positions already. Give more to go on."
        )
    if n_most <= n_output:
        raise OptionError(f"max_tokens is {n_most:,}, but the run has {n_output:,} already. Give more to go on.")
    if n_most <= n_output + n_cue:
        raise OptionError(
            f"max_tokens is {n_most:,}, but the run has {n_output:,} already and the words that ask for the answer "
            f"take {n_cue}. Give more of it, or of context, to go on."
        )
    # a loop that a nudge took back may lie behind the end, and stays written down
    events = [each for each in state["events"] if each["end"] <= n_output or each.get("action") == "nudge"]
    return {**state, "steps": steps, "events": events}


def within(limits: Limits, n_prompt: int) -> Limits:
    """With max_tokens as the room that the context leaves, or less where less was asked for."""
    room = given(limits.context) - n_prompt
    return replace(limits, max_tokens=room if limits.max_tokens is None else min(limits.max_tokens, room))
