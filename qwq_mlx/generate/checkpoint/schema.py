"""Whether what a file calls a saved run is one, of this model: every field and every array, before any is used.

A digest proves that a file is as it was written, not by whom: who edits it can work out another. So nothing is taken on
trust that would end the process (an id or a shape beyond the model), fail later without a name, or contradict itself.

Does not: know whether the ids were really drawn by this model, or their keys and values computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx

from qwq_mlx.engine.decoder import check_ids
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.generate.checkpoint.inspected_steps import inspect_of
from qwq_mlx.generate.loop_recovery import MAX_NUDGES, STRETCH
from qwq_mlx.generate.request import given
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.memory.plan import KV_GROUP
from qwq_mlx.options import LOOP_ACTIONS, from_json
from qwq_mlx.reasoning.loops.detector import Loop, LoopScores
from qwq_mlx.reasoning.scripts import Switch
from qwq_mlx.trace.trace import FinishReason, Injection

__all__ = ["check_arrays", "check_form"]

_REASONS = get_args(FinishReason)
_LOOP_KINDS = tuple(each.name for each in fields(LoopScores))


def check_form(state: Any, *, path: Path) -> None:
    """Check that every field of a saved run's state is there, has its form and agrees with the others.

    Raises SourceError naming file, field, what was found and what a saved run has.
    """
    if not isinstance(state, dict):
        raise _edited(path, "the state", f"a {type(state).__name__}", "an object")
    for name in sorted(state.keys() ^ _FORM.keys()):
        found, expected = ("unknown", "no such field") if name in state else ("missing", _FORM[name][1])
        raise _edited(path, name, found, expected)
    for name, (is_good, expected) in _FORM.items():
        if not is_good(state[name]):
            raise _edited(path, name, _shown(state[name]), expected)
    _check_places(state, path)
    _check_settings(state, path)


def check_arrays(state: Mapping[str, Any], arrays: Mapping[str, mx.array], model: LoadedModel, *, path: Path) -> None:
    """Check a state of good form against the model: its ids, and names, types and shapes of the arrays.

    Raises SourceError as `check_form` does.
    """
    try:
        check_ids([*state["prompt_ids"], *(step[0] for step in state["steps"])], model.tokenizer.n_ids)
    except OptionError as error:
        raise SourceError(f"{path}: {error} The file is edited; it cannot be resumed.") from error
    expected = _cache_arrays(state, arrays, model, path) | _hidden_arrays(state, model, path)
    for name in sorted(arrays.keys() | expected.keys()):
        found, wanted = arrays.get(name), expected.get(name)
        shown = None if found is None else (str(found.dtype).removeprefix("mlx.core."), tuple(found.shape))
        if shown != wanted:
            raise _edited(path, name, *(_array(*each) if each else "no such array" for each in (shown, wanted)))


def _edited(path: Path, what: str, found: str, expected: str) -> SourceError:
    return SourceError(f"{path}: {what} is {found}, expected {expected}. The file is edited; it cannot be resumed.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _array(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {tuple(shape)}"


def _check_places(state: Mapping[str, Any], path: Path) -> None:
    """Places in the output that fields name must be there, and agree with each other."""
    steps, injections = state["steps"], state["injections"]
    injected = {place for place, step in enumerate(steps) if step[3]}
    named = {place for each in injections for place in range(each["start"], min(each["end"], len(steps)))}
    if injected != named or any(not each["start"] < each["end"] <= len(steps) for each in injections):
        raise _edited(path, "injections", _shown(injections), f"the {len(injected)} injected tokens of {len(steps)}")
    if any((step[1] is None) != step[3] for step in steps):
        raise _edited(path, "steps", "without a log-probability", "one for every token that was drawn, and no other")
    if not state["n_shown"] <= len(steps):
        raise _edited(path, "n_shown", str(state["n_shown"]), f"at most {len(steps)}, the tokens there are")
    if state["is_due"] and (not steps or steps[-1][3]):
        raise _edited(path, "is_due", "True", "False where no token was drawn last")
    rows = state["seen"].get("rows", [])
    if state["seen"] and len(rows) != len(steps):
        raise _edited(path, "seen", f"of {len(rows)} tokens", f"{len(steps)}, the tokens there are")


def _check_settings(state: Mapping[str, Any], path: Path) -> None:
    """Options that can be made again, with nothing left open, and what was to be shown."""
    sampling, limits, _ = from_json(state["settings"], where=str(path))
    for options, may_be_open in ((sampling, ()), (limits, ("kv_bits",))):
        for name in (each.name for each in fields(options) if each.name not in may_be_open):
            if getattr(options, name) is None:
                raise _edited(path, f"settings: {name}", "None", "the value that the run had")
    if limits.kv_bits == "auto":
        raise _edited(path, "settings: kv_bits", "'auto'", "8, 4 or None")
    try:
        inspect_of(state["seen"])
    except (OptionError, TypeError) as error:
        raise _edited(path, "seen", f"not what can be asked for ({error})", "options of Inspect") from error


def _cache_arrays(
    state: Mapping[str, Any], arrays: Mapping[str, mx.array], model: LoadedModel, path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every array of the cache, whose length the first one tells."""
    capacities, config = state["capacities"], model.config
    _, limits, _ = from_json(state["settings"], where=str(path))
    if not capacities:
        return {}
    if len(capacities) != config.num_hidden_layers or len(set(capacities)) != 1:
        raise _edited(path, "capacities", _shown(capacities), f"{config.num_hidden_layers} equal numbers, one a layer")
    first = arrays.get("layers.0.keys" if limits.kv_bits is None else "layers.0.keys.codes")
    n_cached = first.shape[2] if first is not None and first.ndim == 4 else 0
    n_most = len(state["prompt_ids"]) + len(state["steps"]) - 1
    if not 1 <= n_cached <= n_most:
        raise _edited(path, "the cache", f"of {n_cached:,} positions", f"1 to {n_most:,}, all but the last id's")
    room = n_positions(max(config.max_position_embeddings, given(limits.context))) + CACHE_STEP
    if not n_cached <= capacities[0] <= room:
        raise _edited(path, "capacities", _shown(capacities), f"from {n_cached:,}, what is there, to {room:,}")
    heads, width, dtype = config.num_key_value_heads, config.head_dim, model.compute_type
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"": (dtype, (1, heads, n_cached, width))}
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


def _hidden_arrays(state: Mapping[str, Any], model: LoadedModel, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    layers, steps = inspect_of(state["seen"]).hidden_layers, state["steps"]
    if layers and max(layers) > model.config.num_hidden_layers:
        raise _edited(path, "seen", f"of layer {max(layers)}", f"0 to {model.config.num_hidden_layers}")
    shape = (len(steps), model.config.hidden_size)
    return {f"hidden.{layer}": ("float32", shape) for layer in layers if steps}


def _is_whole(value: Any, high: float = math.inf) -> bool:
    return type(value) is int and 0 <= value <= high


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or _is_finite(value)


def _is_step(value: Any) -> bool:
    """[id, log-probability, entropy, is_injected]; ids are checked with their places."""
    is_row = isinstance(value, list) and len(value) == 4 and isinstance(value[3], bool)
    return is_row and all(each is None or _is_finite(each) for each in value[1:3])


def _is_injection(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {each.name for each in fields(Injection)}
        and _is_whole(value["start"])
        and _is_whole(value["end"])
        and isinstance(value["text"], str)
        and value["reason"] in _REASONS
    )


def _is_event(value: Any) -> bool:
    """A loop with what was done about it, or a switch to another script, as `Noticed` writes them down."""
    kinds: dict[Any, Any] = {"loop": Loop, "switch": Switch}
    kind = kinds.get(value.get("event")) if isinstance(value, dict) and isinstance(value.get("event"), str) else None
    extra = {"event", "action"} if kind is Loop else {"event"}
    if kind is None or value.keys() != {each.name for each in fields(kind)} | extra:
        return False
    if not _is_whole(value["start"]) or not _is_whole(value["end"]):
        return False
    if kind is Switch:
        scripts = value["scripts"]
        are_counts = isinstance(scripts, dict) and all(map(_is_whole, scripts.values()))
        return are_counts and _is_whole(value["at"]) and _is_number(value["share"])
    return (
        value["kind"] in _LOOP_KINDS
        and value["action"] in LOOP_ACTIONS
        and (value["period"] is None or _is_whole(value["period"]))
        and _is_number(value["score"])
        and isinstance(value["evidence"], str)
    )


def _is_seen(value: Any) -> bool:
    """{}, or what `Inspect` was asked for and [margin, alternatives, loop scores] of every token."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.keys() != {"asked", "rows"} or not isinstance(value["rows"], list):
        return False
    asked = value["asked"]
    is_asked = isinstance(asked, dict) and isinstance(asked.get("hidden_layers"), list)
    return is_asked and all(_is_seen_row(row) for row in value["rows"])


def _is_seen_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[1], list):
        return False
    margin, top, scores = row
    is_top = all(
        isinstance(each, list) and len(each) == 3 and _is_whole(each[0]) and isinstance(each[1], str)
        # an alternative that a hook or a bias forbids may have no probability
        and type(each[2]) is float and not math.isnan(each[2])
        for each in top
    )  # fmt: skip
    is_scores = scores is None or (
        isinstance(scores, list) and len(scores) == len(fields(LoopScores)) and all(map(_is_finite, scores))
    )
    return is_top and is_scores and (margin is None or type(margin) is float)


def _is_list_of(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_good, value))


def _is_settings(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() - {"logits_hook", "forked_at"} == {"sampling", "limits", "thinking"}
        and value.get("logits_hook", True) is True
        and _is_whole(value.get("forked_at", 0))
    )


_FORM: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_sha256": (lambda value: isinstance(value, str), "a text"),
    "compute_type": (lambda value: isinstance(value, str), "a text"),
    "settings": (_is_settings, "sampling, limits and thinking"),
    "prompt_ids": (lambda value: isinstance(value, list) and bool(value), "a list of ids"),
    "question": (lambda value: isinstance(value, str), "a text"),
    "steps": (_is_list_of(_is_step), "a list of [id, log-probability, entropy, is_injected]"),
    "injections": (_is_list_of(_is_injection), "a list of start, end, text and reason"),
    "events": (_is_list_of(_is_event), "a list of loops and switches"),
    "asking": (
        lambda value: (
            value is None
            or (isinstance(value, list) and len(value) == 2 and value[0] in _REASONS and _is_whole(value[1]))
        ),
        "null, or why and when the answer was asked for",
    ),
    "nudges": (
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and _is_whole(value[0], MAX_NUDGES)
            and _is_whole(value[1], STRETCH)
        ),
        f"at most {MAX_NUDGES} nudges, and at most {STRETCH} tokens left of one",
    ),
    "capacities": (_is_list_of(_is_whole), "a list of positions"),
    "finish_reason": (lambda value: value is None or value in _REASONS, f"null or one of {', '.join(_REASONS)}"),
    "seen": (_is_seen, "what Inspect was asked for, and a row for every token"),
    "n_shown": (_is_whole, "a number of tokens"),
    "is_due": (lambda value: isinstance(value, bool), "true or false"),
}
"""Every field of a saved run's state: whether a value has its form, and that form in words."""
