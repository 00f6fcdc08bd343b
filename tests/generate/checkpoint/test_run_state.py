"""Saved runs that somebody edited, with a digest that fits: each is refused by name, or goes on without an accident."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.errors import QwqError, SourceError
from qwq_mlx.generate.checkpoint import file as checkpoint
from qwq_mlx.generate.checkpoint.file import read_checkpoint, write_checkpoint
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking

pytestmark = pytest.mark.tiny

Saved = tuple[dict[str, Any], dict[str, mx.array]]


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def saved(reasoner: Reasoner, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run with all there can be in its state: an answer cue, events, hidden states, alternatives, scores."""
    run = reasoner.stream(
        "x",
        sampling=Sampling(temperature=1.0, seed=4, logit_bias=dict.fromkeys(reasoner.model.stop_ids, float("-inf"))),
        limits=Limits(max_tokens=120),
        thinking=Thinking(think_tokens=3, on_loop="answer"),
        inspect=Inspect(top_k=2, hidden_layers=(0, 2), loop_scores=True),
    )
    while not next(run).is_injected:
        pass
    for _ in range(16):
        next(run)
    path = tmp_path_factory.mktemp("saved") / "run"
    run.save(path)
    state, arrays = read_checkpoint(path)
    loop = {"kind": "doubts", "start": 0, "end": 2, "period": None, "score": 3.5, "evidence": "it says so"}
    switch = {"start": 0, "end": 3, "at": 1, "scripts": {"Han": 2}, "share": 0.5}
    state["events"] = [{"event": "loop", "action": "nudge", **loop}, {"event": "switch", **switch}]
    return state, arrays


def resumed(reasoner: Reasoner, state: Any, arrays: dict[str, mx.array], path: Path) -> None:
    write_checkpoint(path, state, arrays)
    run = reasoner.resume(path)
    for _ in range(3):
        next(run, None)
    run.trace().describe()


def test_the_run_itself_goes_on(reasoner: Reasoner, saved: Saved, tmp_path: Path) -> None:
    resumed(reasoner, *saved, tmp_path / "run")


def edit(*keys: Any, to: Any) -> Callable[[dict[str, Any], dict[str, mx.array]], None]:
    def apply(state: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        target: Any = state
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = to

    return apply


def array(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[dict[str, Any], dict[str, mx.array]], None]:
    def apply(state: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        arrays[name] = change(arrays[name])

    return apply


EDITS: list[tuple[Any, str]] = [
    (array("layers.1.values", lambda x: x[:, :1]), r"layers\.1\.values is float32 \(1, 1, \d+, 32\), expected float32"),
    (array("layers.0.keys", lambda x: x[..., :8]), r"layers\.0\.keys is float32 \(1, 2, \d+, 8\), expected float32"),
    (array("layers.1.keys", lambda x: x[:, :, 1:]), r"layers\.1\.keys is float32 .* expected float32 \(1, 2, \d+, 32"),
    (array("layers.0.keys", lambda x: x.astype(mx.bfloat16)), r"layers\.0\.keys is bfloat16 .* expected float32"),
    (array("layers.0.keys", lambda x: x[0]), r"the cache is of 0 positions, expected 1 to \d+, all but the last id's"),
    (array("hidden.2", lambda x: x[1:]), r"hidden\.2 is float32 \(\d+, 128\), expected float32 \(\d+, 128\)"),
    (lambda _, arrays: arrays.pop("layers.1.keys"), r"layers\.1\.keys is no such array, expected float32"),
    (lambda _, arrays: arrays.update(extra=mx.ones(3)), r"extra is float32 \(3,\), expected no such array"),
    (lambda state, _: state["capacities"].pop(), r"capacities is \(256,\), expected 2 equal numbers, one a layer"),
    (edit("capacities", to=[10**12] * 2), r"capacities is \(10{12}, 10{12}\), expected from \d+, what is there, to"),
    (edit("capacities", to=[1, 1]), r"capacities is \(1, 1\), expected from \d+, what is there"),
    (edit("capacities", to=[2.0, 2.0]), r"capacities\[0\] is 2\.0, expected a whole number"),
    (lambda state, _: state.pop("nudges"), r"nudges is missing, expected a value"),
    (edit("more", to=1), r"more is present, expected no such field"),
    (edit("nudges", to=[4, 0]), r"nudges is \(4, 0\), expected at most 3 nudges, and at most 128 tokens left"),
    (edit("finish_reason", to="done"), r"finish_reason is 'done', expected one of 'stop', 'answered', 'length'"),
    (edit("asking", to=["now", 1]), r"asking\[0\] is 'now', expected one of 'stop', 'answered'"),
    (edit("prompt_ids", to=[]), r"prompt_ids is empty, expected the ids of a prompt"),
    (edit("steps", 0, to=[1, None]), r"steps\[0\] is \[1, None\], expected a list of 4"),
    (
        edit("steps", 0, 1, to=None),
        r"steps\[0\] is \(None, .*\), expected a log-probability for every token that was drawn",
    ),
    (edit("steps", 0, 1, to=float("nan")), r"steps\[0\] is \(nan, .*\), expected a log-probability for every"),
    (edit("steps", 0, 3, to=True), r"injections is \(Injection.*…, expected the \d+ injected tokens of \d+"),
    (edit("injections", 0, "end", to=900), r"injections is \(Injection.*…, expected the \d+ injected tokens of \d+"),
    (edit("injections", 0, "reason", to="why"), r"injections\[0\]\.reason is 'why', expected one of"),
    (edit("events", 0, "score", to="high"), r"events\[0\]\.score is 'high', expected a number"),
    (edit("n_shown", to=10**6), r"n_shown is 1000000, expected 0 to \d+, the tokens there are"),
    (lambda state, _: state["seen"]["rows"].pop(), r"seen is of \d+ tokens, expected \d+, the tokens there are"),
    (
        edit("seen", "asked", "top_k", to=-1),
        r"seen\.asked is .*, expected a sound one \(top_k is -1",
    ),
    (edit("seen", "asked", "depth", to=1), r"seen\.asked\.depth is present, expected no such field"),
    (edit("seen", "asked", "hidden_layers", to=[0, 9]), r"seen is of layer 9, expected 0 to 2"),
    (edit("seen", "rows", 0, to=[None, 3, None]), r"seen\.rows\[0\]\[1\] is 3, expected a list"),
    (edit("settings", "limits", "context", to=None), r"settings\.context is null, expected the value that the run had"),
    (edit("settings", "sampling", "seed", to=None), r"settings\.seed is null, expected the value that the run had"),
    (edit("settings", "limits", "kv_bits", to="auto"), r"settings\.kv_bits is 'auto', expected 8, 4 or null"),
    (edit("settings", "limits", "kv_bits", to=8), r"the cache is of 0 positions, expected 1 to"),
    (edit("settings", "thinking", "on_loop", to="dance"), r"the settings cannot be read \(on_loop is 'dance'"),
    (edit("settings", "more", to={}), r"settings is .*, expected sampling, limits and thinking"),
]


@pytest.mark.parametrize(("change", "message"), EDITS, ids=[message[:40] for _, message in EDITS])
def test_each_edit_is_refused_by_its_name(
    change: Any, message: str, reasoner: Reasoner, saved: Saved, tmp_path: Path
) -> None:
    state, arrays = copy.deepcopy(saved[0]), dict(saved[1])
    change(state, arrays)
    with pytest.raises(SourceError, match=rf"run: {message}") as error:
        resumed(reasoner, state, arrays, tmp_path / "run")
    assert re.search(r"The file is (damaged or )?edited", str(error.value))


def test_a_token_drawn_last_cannot_follow_from_an_injected_one(
    reasoner: Reasoner, saved: Saved, tmp_path: Path
) -> None:
    state = copy.deepcopy(saved[0])
    end = state["injections"][0]["end"]
    state["steps"], state["seen"], state["n_shown"] = state["steps"][:end], {}, end
    with pytest.raises(SourceError, match="is_due is true, expected false where no token was drawn last"):
        resumed(reasoner, state, {}, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", mx.zeros((2, 2), mx.uint8), r"the array 'state' is U8 \(2, 2\), expected U8 with one axis"),
        ("state", mx.zeros((4,)), r"the array 'state' is F32 \(4,\), expected U8 with one axis"),
        ("state", mx.array(np.frombuffer(b'{"a": ', np.uint8)), r"the run's state is no JSON \(.*The file is edited"),
        ("state", mx.array(np.frombuffer(b"\xff\xfe", np.uint8)), r"the run's state is no JSON \("),
        ("state", mx.array(np.frombuffer(b"[" * 10**5, np.uint8)), r"the run's state is no JSON \("),
        ("state", mx.array(np.frombuffer(b"9" * 10**4, np.uint8)), r"the run's state is no JSON \("),
        ("state", mx.array(np.frombuffer(b"[]", np.uint8)), r"the value is \[\], expected an object"),
        ("other", mx.zeros((4,), mx.uint8), r"the array 'state' is missing, expected U8 with one axis"),
        ("x", mx.zeros((4,), mx.int16), r"the array x is I16, expected one of BF16, F16, F32, U32, U8"),
    ],
)
def test_a_state_that_is_none_is_refused(
    name: str, value: mx.array, message: str, reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        # the writer puts this array in the place of its own, or a type that it does not write
        patched.setattr(checkpoint, "_STATE", name)
        patched.setattr(checkpoint, "_DTYPES", {**checkpoint._DTYPES, "int16": "I16"})
        patched.setattr(checkpoint.mx, "array", lambda *_: value)
        write_checkpoint(tmp_path / "run", {}, {})
    with pytest.raises(SourceError, match=message):
        reasoner.resume(tmp_path / "run")


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "loop", "1e999", [],
    [0], [[]], {}, {"a": 1}, [1, -0.5, 0.5, False], "\ud800", "8",
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(state: dict[str, Any], arrays: dict[str, mx.array], rng: random.Random) -> None:
    """One random change of a field at any depth, or of an array."""
    if rng.random() < 0.25:
        name = rng.choice(sorted(arrays))
        value = arrays[name]
        changes: list[Callable[[], Any]] = [
            lambda: arrays.pop(name),
            lambda: arrays.update({name + "x": arrays.pop(name)}),
            lambda: arrays.update({name: value[..., :-1]}),
            lambda: arrays.update({name: value[..., :0]}),
            lambda: arrays.update({name: value.reshape(-1)}),
            lambda: arrays.update({name: mx.concatenate([value, value], axis=rng.randrange(value.ndim))}),
            lambda: arrays.update({name: value.astype(rng.choice([mx.float16, mx.bfloat16, mx.uint32, mx.uint8]))}),
            lambda: arrays.update({name: mx.full(value.shape, float("nan"))}),
        ]
        rng.choice(changes)()
        return
    container, key = rng.choice(places(state))
    kind = rng.randrange(4)
    if kind == 0 and isinstance(container, dict):
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice(container)))
    elif kind == 2:
        container[key] = copy.deepcopy(rng.choice(rng.choice([c for c, _ in places(state) if isinstance(c, list)])))
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))


def test_no_mutation_ends_in_another_error_than_ours(reasoner: Reasoner, saved: Saved, tmp_path: Path) -> None:
    """100 random edits with a digest that fits: most are refused, the rest go on; nothing else happens."""
    text, n_refused = json.dumps(saved[0]), 0
    for seed in range(100):
        rng = random.Random(seed)
        state, arrays = json.loads(text), dict(saved[1])
        for _ in range(rng.randint(1, 3)):
            mutated(state, arrays, rng)
        try:
            resumed(reasoner, state, arrays, tmp_path / "run")
        except QwqError as error:
            n_refused += 1
            assert str(error)
    assert 50 < n_refused < 100
