"""What a saved run needs before it goes on: the same model, sound arrays, room, and an end that can be taken back.

A run that ended without an answer can be asked for it later. The id that ended its text is taken off, or the last
tokens of a full context, and the answer cue stands in their place.

Does not: read files, or run anything (`reasoner` and `stream` do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from qwq_mlx.engine.ranks.whole_cache import type_name
from qwq_mlx.engine.row import check_ids
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.json_dataclass import shown
from qwq_mlx.generate.checkpoint.file import model_digest, read_checkpoint
from qwq_mlx.generate.checkpoint.inspected_steps import HIDDEN
from qwq_mlx.generate.checkpoint.state import RunState, read_state
from qwq_mlx.generate.request import resolved
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.memory.plan import KV_GROUP
from qwq_mlx.options import Limits, from_json

__all__ = ["check_saved", "opened", "raised", "read_saved", "with_room", "within"]

_Form = tuple[str, tuple[int, ...]]  # type and shape of an array
_GOES_ON = (None, "interrupted", "length", "context_full")


def check_saved(
    state: RunState, arrays: Mapping[str, mx.array], model: LoadedModel, *, has_processors: bool, path: Path
) -> None:
    """Raises SourceError where the file holds a run of another model or type, or arrays that do not fit the model;
    OptionError where its logits processors are missing."""
    if state.model_sha256 != model_digest(model.folder):
        raise SourceError(
            f"{path}: was saved with another model than {model.folder} (their digests differ). "
            "Give the folder that the run was started with."
        )
    if state.compute_type != model.compute_type:
        raise SourceError(
            f"{path}: was computed in {state.compute_type}, this model computes in {model.compute_type}. "
            f"Load it with compute_type={state.compute_type!r}."
        )
    if state.settings.get("logits_processors") and not has_processors:
        raise OptionError(
            f"{path}: the run had logits processors of its caller, which no file can hold. Give them again: "
            "resume(..., logits_processors=[...])."
        )
    _check_arrays(state, arrays, model, path)


def read_saved(
    path: Path, model: LoadedModel, *, has_processors: bool, answer_now: bool
) -> tuple[RunState, dict[str, mx.array]]:
    """The state of a saved run that this model can go on with, and the arrays of its file; see `check_saved`, `opened`.

    Raises SourceError for a file that is damaged too.
    """
    value, arrays = read_checkpoint(path)
    state = read_state(value, path=path)
    check_saved(state, arrays, model, has_processors=has_processors, path=path)
    return opened(state, model, path=path, answer_now=answer_now), arrays


def opened(state: RunState, model: LoadedModel, *, path: Path, answer_now: bool) -> RunState:
    """The state to go on from. answer_now: without the id that ended the text, if one did.

    Raises SourceError where the run has ended and is not asked for its answer; OptionError where it cannot be.
    """
    reason, steps = state.finish_reason, state.steps
    if not answer_now:
        if reason not in _GOES_ON:
            raise SourceError(
                f"{path}: the run has ended ({reason}), so there is nothing to resume. If it has no answer, "
                "`answer_now=True` asks for it."
            )
        return state
    if state.injections:
        raise OptionError(f"answer_now: {path} was asked for its answer already. Start another run.")
    if reason != "stop":
        return state.without_end(len(steps))
    if steps[-1][0] not in model.stop_ids:
        raise OptionError(f"answer_now: {path} ended with a stop text, so it would end at once. Start another run.")
    return state.without_end(len(steps) - 1)


def raised(limits: Limits, state: RunState, *, max_tokens: int | None, context: int | None) -> Limits:
    """A saved run's limits with those that were given; what the old context alone had bounded grows with it."""
    n_prompt = len(state.prompt_ids)
    if max_tokens is None and limits.max_tokens != resolved(limits.context) - n_prompt:
        max_tokens = limits.max_tokens
    return within(replace(limits, max_tokens=max_tokens, context=context or limits.context), n_prompt)


def with_room(state: RunState, limits: Limits, *, n_cue: int, answer_tokens: int) -> RunState:
    """The state, checked for room to go on. n_cue: ids of an answer cue that comes first, 0 for none.

    Where the context was full and a cue comes, the last tokens make room for it and for the answer: `answer_tokens`,
    but a quarter of the output at most. Raises OptionError where there is no room.
    """
    n_most = resolved(limits.max_tokens)
    if n_cue and state.finish_reason == "context_full":
        n_answer = min(answer_tokens, n_most // 4) + 1  # one more, so that the answer's own limit ends it
        state = state.without_end(max(0, n_most - n_cue - n_answer))
    n_output = len(state.steps)
    n_known = len(state.prompt_ids) + n_output
    if resolved(limits.context) <= n_known:
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
    return state


def within(limits: Limits, n_prompt: int) -> Limits:
    """With max_tokens as the room that the context leaves, or less where less was asked for."""
    room = resolved(limits.context) - n_prompt
    return replace(limits, max_tokens=room if limits.max_tokens is None else min(limits.max_tokens, room))


def _check_arrays(state: RunState, arrays: Mapping[str, mx.array], model: LoadedModel, path: Path) -> None:
    """Check a state against the model: its ids, and names, types and shapes of the arrays. Raises SourceError."""
    try:
        check_ids([*state.prompt_ids, *(step[0] for step in state.steps)], model.tokenizer.n_ids)
    except OptionError as error:
        raise SourceError(f"{path}: {error} The file is edited; it cannot be resumed.") from error
    expected = _cache_arrays(state, arrays, model, path) | _hidden_arrays(state, model, path)
    for name in sorted(arrays.keys() | expected.keys()):
        array = arrays.get(name)
        actual = None if array is None else (type_name(array), tuple(array.shape))
        if actual != expected.get(name):
            raise _edited(path, name, _array(actual), _array(expected.get(name)))


def _edited(path: Path, what: str, actual: str, expected: str) -> SourceError:
    return SourceError(f"{path}: {what} is {actual}, expected {expected}. The file is edited; it cannot be resumed.")


def _array(form: _Form | None) -> str:
    return "no such array" if form is None else f"{form[0]} {form[1]}"


def _cache_arrays(state: RunState, arrays: Mapping[str, mx.array], model: LoadedModel, path: Path) -> dict[str, _Form]:
    """Type and shape of every array of the cache, whose length the first one tells."""
    capacities, config = state.capacities, model.config
    _, limits, _ = from_json(state.settings, where=str(path))
    if not capacities:
        return {}
    if len(capacities) != config.num_hidden_layers or len(set(capacities)) != 1:
        raise _edited(path, "capacities", shown(capacities), f"{config.num_hidden_layers} equal numbers, one a layer")
    first = arrays.get("layers.0.keys" if limits.kv_bits is None else "layers.0.keys.codes")
    n_cached = first.shape[2] if first is not None and first.ndim == 4 else 0
    n_most = len(state.prompt_ids) + len(state.steps) - 1
    if not 1 <= n_cached <= n_most:
        raise _edited(path, "the cache", f"of {n_cached:,} positions", f"1 to {n_most:,}, all but the last id's")
    room = n_positions(max(config.max_position_embeddings, resolved(limits.context))) + CACHE_STEP
    if not n_cached <= capacities[0] <= room:
        raise _edited(path, "capacities", shown(capacities), f"from {n_cached:,}, what is there, to {room:,}")
    heads, width, dtype = config.num_key_value_heads, config.head_dim, model.compute_type
    shapes: dict[str, _Form] = {"": (dtype, (1, heads, n_cached, width))}
    if isinstance(limits.kv_bits, int):
        groups = (1, heads, n_cached, width // KV_GROUP)
        codes = ("uint32", (1, heads, n_cached, width * limits.kv_bits // 32))
        shapes = {".codes": codes, ".scales": (dtype, groups), ".biases": (dtype, groups)}
    return {
        f"layers.{layer}.{name}{part}": shape
        for layer in range(config.num_hidden_layers)
        for name in ("keys", "values")
        for part, shape in shapes.items()
    }


def _hidden_arrays(state: RunState, model: LoadedModel, path: Path) -> dict[str, _Form]:
    layers = () if state.seen is None else state.seen.asked.hidden_layers
    if layers and max(layers) > model.config.num_hidden_layers:
        raise _edited(path, "seen", f"of layer {max(layers)}", f"0 to {model.config.num_hidden_layers}")
    shape = (len(state.steps), model.config.hidden_size)
    return {f"{HIDDEN}{layer}": ("float32", shape) for layer in layers if state.steps}
