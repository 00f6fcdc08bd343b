"""A saved run becomes a request and a state that can go on, and whatever makes that impossible an `ApiError`.

It runs beside the model's thread and touches no array: the KV cache of a file is read by that thread (`rows`).

Does not: find runs (`runs` does).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qwq_mlx.errors import FitError, OptionError, SourceError
from qwq_mlx.generate.checkpoint.file import read_state_value
from qwq_mlx.generate.checkpoint.resume import opened
from qwq_mlx.generate.checkpoint.state import RunState, read_state
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.request import Request
from qwq_mlx.options import Inspect
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.jobs import Ask, Restored
from qwq_mlx.serve.run_state import SavedRun, read_run_state

__all__ = ["resumed"]


def resumed(reasoner: Reasoner, saved: SavedRun, *, identity: str, context: int) -> tuple[Ask, Request, Restored]:
    """What a run asks for that goes on, and from where. identity: of this model. context: positions of a request here.

    Raises ApiError: 409 for a run that cannot go on, 400 for limits that it cannot go on with.
    """
    if saved.request is not None and saved.model != identity:
        raise ApiError(
            409, f"{saved.id} was written by another model. Start the server with that one.", code="other_model"
        )
    try:
        state, path = _state(saved)
        inspect = Inspect() if state.seen is None else state.seen.asked
        if saved.fork_at is not None:
            state = _forked(state, saved, at=saved.fork_at)
        else:
            state = opened(state, reasoner.model, path=Path(saved.id), answer_now=saved.answer_now)
        request, state = reasoner.request_of_state(
            state,
            max_tokens=saved.max_tokens,
            context=saved.context,
            answer_now=saved.answer_now,
            inspect=inspect,
        )
    except SourceError as error:
        raise ApiError(409, str(error), code="not_resumable") from error
    except (OptionError, FitError) as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0].rstrip(":")) from error
    if request.context > context:
        message = (
            f"The run has {request.context:,} positions, this server {context:,}. Start it with a larger --context."
        )
        raise ApiError(400, message, param="context", code="context_length_exceeded")
    if state.compute_type != reasoner.model.compute_type:
        computed, here = state.compute_type, reasoner.model.compute_type
        raise ApiError(409, f"{saved.id} was computed in {computed}, this server computes in {here}.")
    ask = Ask(
        sampling=request.sampling,
        thinking=request.thinking,
        top_logprobs=request.inspect.top_k,
        shows_steps=True,
    )
    return ask, request, Restored(state=state, path=path, answer_now=saved.answer_now)


def _state(saved: SavedRun) -> tuple[RunState, Path | None]:
    """The run's state, and its file where that is as far as what is known otherwise."""
    n_steps = 0 if saved.progress is None else saved.progress["n_steps"]
    if saved.path is not None and saved.fork_at is None:
        state = read_state(read_state_value(saved.path), path=saved.path)
        if len(state.steps) >= n_steps:
            return state, saved.path
    if saved.request is None:
        raise SourceError(f"{saved.id}: there is no such run.")
    state = read_run_state(saved.request, saved.progress, saved.lines, where=saved.id)
    if saved.progress is None and state.settings.get("forked_at"):
        raise SourceError(
            f"{saved.id}: the fork had not begun, so there is nothing to resume. Fork the other run again."
        )
    return state, None


def _forked(state: RunState, saved: SavedRun, *, at: int) -> RunState:
    """The beginning of a run as another one goes on with it; see `Stream.fork`."""
    if at > len(state.steps):
        raise OptionError(f"at is {at}, expected from 0 to {len(state.steps)}, the tokens that the run can go on from.")
    sampling = {**state.settings["sampling"], "seed": saved.seed}
    state = replace(state, settings={**state.settings, "sampling": sampling, "forked_at": at})
    return state.until(at, texts=[json.loads(line)["text"] for line in saved.lines])
