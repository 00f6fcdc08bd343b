"""Looking at a run changes nothing, and what is seen is what transformers and plain numpy give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.engine.logits_processors import LogitsProcessor
from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.stream import Stream
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.reasoning.loops import LoopDetector, LoopOptions

pytestmark = pytest.mark.tiny
ALL = Inspect(top_k=5, hidden_layers=(0, 1, 2), loop_scores=True)


@pytest.fixture(scope="module")
def reasoner(known_checkpoint: Path) -> Reasoner:
    return load(known_checkpoint)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    """Heads of 64, which a quantized cache needs."""
    return load(write_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "model", n_heads=2, n_kv_heads=1))


def started(
    reasoner: Reasoner, inspect: Inspect | None, n: int = 30, *, hook: LogitsProcessor | None = None, **options: Any
) -> Stream:
    sampling = Sampling(**({"temperature": 1.0, "seed": 4} | options))
    return reasoner.stream(
        "x 数",
        sampling=sampling,
        limits=Limits(max_tokens=n),
        inspect=inspect,
        logits_processors=() if hook is None else (hook,),
    )


def plain_logits(reasoner: Reasoner, ids: list[int]) -> np.ndarray:
    logits = reasoner.model.module(mx.array([ids]))[0, -1, : reasoner.pieces.n_ids]
    return np.array(logits.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 0, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("limits", [{}, {"banned": ("e", "99")}, {"kv_bits": 8}])
def test_ids_and_numbers_are_the_same_with_everything_inspected(
    wide: Reasoner, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    given = {"sampling": Sampling(**{"seed": 4, **options}), "limits": Limits(max_tokens=30, **limits)}
    plain = list(wide.stream("x 数", **given))
    seen = list(wide.stream("x 数", **given, inspect=ALL, logits_processors=[lambda tokens, logits: logits]))
    for one, other in zip(plain, seen, strict=True):
        assert (one.id, one.text, one.logprob, one.entropy) == (other.id, other.text, other.logprob, other.entropy)
    assert all(step.alternatives == () and step.hidden == {} and step.margin is None for step in plain)


def test_alternatives_are_the_likeliest_ids_of_the_whole_forward(reasoner: Reasoner) -> None:
    run = started(reasoner, Inspect(top_k=5), n=12)
    before = list(run.request.prompt_ids)
    for step in run:
        logits = plain_logits(reasoner, before)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logprobs)[:5]
        assert [each.id for each in step.alternatives] == best.tolist()
        assert [each.logprob for each in step.alternatives] == pytest.approx(logprobs[best], abs=1e-4)
        assert step.margin == pytest.approx(logprobs[best[0]] - logprobs[best[1]], abs=1e-4)
        for each in step.alternatives:
            assert each.text == reasoner.pieces[each.id].decode("utf-8", "replace")
        before.append(step.id)
    assert len(before) == len(run.request.prompt_ids) + 12


def test_one_alternative_has_its_margin_and_all_ids_can_be_asked_for(reasoner: Reasoner) -> None:
    one = next(started(reasoner, Inspect(top_k=1)))
    every = next(started(reasoner, Inspect(top_k=reasoner.pieces.n_ids)))
    assert len(one.alternatives) == 1 and one.margin == every.margin and one.margin is not None and one.margin > 0
    assert len(every.alternatives) == reasoner.pieces.n_ids
    assert math.fsum(math.exp(each.logprob) for each in every.alternatives) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_hidden_states_are_those_of_transformers(tie: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_checkpoint(tmp_path / "model", n_layers=3, tie=tie)
    reasoner = load(folder, compute_type="float32")
    run = started(reasoner, Inspect(hidden_layers=(0, 1, 2, 3)), n=8)
    steps = list(run)
    ids = [*run.request.prompt_ids, *(step.id for step in steps)]
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for step in steps:
        place = len(run.request.prompt_ids) + step.index - 1
        assert list(step.hidden) == [0, 1, 2, 3]
        for layer, found in step.hidden.items():
            assert found.dtype == np.float32 and found.shape == (128,)
            np.testing.assert_allclose(found, states[layer][0, place].numpy(), atol=2e-5)


def test_a_hook_changes_what_is_drawn_but_not_what_is_reported(reasoner: Reasoner) -> None:
    seen: list[list[int]] = []
    wanted = [40, 41, 42, 43, 44, 45]

    def hook(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.where(mx.arange(logits.size) == wanted[len(seen) - 1], logits, -mx.inf)

    run = started(reasoner, Inspect(top_k=2), n=6, hook=hook)
    steps = list(run)
    assert [step.id for step in steps] == wanted
    prompt = list(run.request.prompt_ids)
    assert seen == [prompt + wanted[:index] for index in range(6)], "each step once, all ids before it"
    for step in steps:
        logits = plain_logits(reasoner, prompt + wanted[: step.index])
        expected = logits[step.id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert step.logprob == pytest.approx(expected, abs=1e-4), "the model's own"
        assert step.alternatives[0].id == logits.argmax()


def test_the_next_step_is_under_way_before_one_is_read(reasoner: Reasoner) -> None:
    sizes: list[int] = []

    def hook(tokens: mx.array, logits: mx.array) -> mx.array:
        sizes.append(tokens.size)
        return logits

    run = started(reasoner, Inspect(top_k=3, hidden_layers=(1,)), n=10, hook=hook)
    n_prompt = len(run.request.prompt_ids)
    for n in range(1, 5):
        next(run)
        assert sizes == list(range(n_prompt, n_prompt + n + 1))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"A logits processor returned NoneType at step 0, expected an mx\.array of shape \(1, 298\)"),
        (mx.zeros(3), r"A logits processor returned an array of shape \(3,\) at step 0"),
        (mx.full((1, 298), mx.nan), "Step 0: a logits processor returned NaN"),
        (mx.full((1, 298), -mx.inf), "Step 0: a logits processor returned NaN, .infinity, or -infinity for every id"),
        (mx.full((1, 298), mx.inf), "Step 0: a logits processor returned NaN"),
    ],
)
def test_a_hook_that_returns_no_logits_is_named(reasoner: Reasoner, result: Any, message: str) -> None:
    assert reasoner.pieces.n_ids == 298
    run = started(reasoner, None, hook=lambda tokens, logits: result)
    with pytest.raises((OptionError, GenerationError), match=message):
        next(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1, expected a whole number of at least 0"),
        ({"top_k": True}, "top_k is True"),
        ({"hidden_layers": [1]}, r"hidden_layers is \[1\], expected a tuple of layer numbers"),
        ({"hidden_layers": (-1,)}, r"hidden_layers is \(-1,\)"),
        ({"hidden_layers": (1, 1)}, r"hidden_layers is \(1, 1\), expected each layer once"),
        ({"loop_scores": 1}, "loop_scores is 1, expected True or False"),
        ({"entropy": 0}, "entropy is 0, expected True or False"),
    ],
)
def test_what_nobody_can_ask_for_is_refused_when_it_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Inspect(**options)


@pytest.mark.parametrize(
    ("inspect", "message"),
    [
        (Inspect(top_k=299), "top_k is 299, expected at most 298, the ids that the tokenizer has"),
        (Inspect(hidden_layers=(0, 3)), r"hidden_layers holds 3, expected numbers from 0 .* to 2"),
        (Inspect(loop_scores=True), "loop_scores is True, but on_loop is 'off'"),
    ],
)
def test_what_this_run_cannot_show_is_refused_before_it_starts(
    reasoner: Reasoner, inspect: Inspect, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        reasoner.stream("x", thinking=Thinking(on_loop="off"), inspect=inspect)


def test_loop_scores_rise_to_one_where_the_detector_reports(reasoner: Reasoner) -> None:
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")
    bias = dict.fromkeys(reasoner.model.stop_ids, float("-inf")) | {letter: 50.0}
    run = reasoner.stream(
        "x",
        sampling=Sampling(temperature=0.0, logit_bias=bias),
        limits=Limits(max_tokens=300),
        thinking=Thinking(on_loop="stop"),
        inspect=Inspect(loop_scores=True),
    )
    scores = [step.loop_scores.cycle for step in run if step.loop_scores is not None]
    assert run.trace().finish_reason == "loop" and len(scores) == len(run.trace().ids)
    assert scores[0] == 0 and scores[-1] >= 1 and max(scores[:-1]) < 1
    detector = LoopDetector()
    for place in range(4):
        detector.feed(place, "The answer is 7.\n")
    assert detector.scores.candidate == pytest.approx(4 / LoopOptions().n_candidates, abs=1e-4)


def test_a_fork_keeps_what_was_seen_and_looks_on(reasoner: Reasoner) -> None:
    run = started(reasoner, Inspect(top_k=2))
    steps = list(run)
    fork = run.fork(at=10, seed=4)
    assert list(fork) == steps[10:] and fork.trace().ids == run.trace().ids


def test_a_saved_run_asks_for_its_processors_again(reasoner: Reasoner, tmp_path: Path) -> None:
    def hook(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.size) == 50 + tokens.size - n_prompt, 99.0, logits)

    run = started(reasoner, None, n=8, hook=hook)
    n_prompt = len(run.request.prompt_ids)
    first = [next(run) for _ in range(4)]
    run.save(tmp_path / "run")
    with pytest.raises(OptionError, match="the run had logits processors of its caller, which no file can hold"):
        reasoner.resume(tmp_path / "run")
    rest = list(reasoner.resume(tmp_path / "run", logits_processors=[hook]))
    assert [step.id for step in (*first, *rest)] == [50, 51, 52, 53, 54, 55, 56, 57]


def test_what_is_no_processor_is_refused_before_the_run_starts(reasoner: Reasoner) -> None:
    with pytest.raises(OptionError, match=r"logits_processors is \[3\], expected functions \(tokens, logits\)"):
        reasoner.stream("x", logits_processors=[3])  # type: ignore[list-item]


def test_the_trace_keeps_what_was_seen_and_comes_back_from_disk(reasoner: Reasoner, tmp_path: Path) -> None:
    run = reasoner.stream(
        "x",
        sampling=Sampling(temperature=1.0, seed=4),
        limits=Limits(max_tokens=60),
        thinking=Thinking(think_tokens=0, answer_tokens=10),
        inspect=Inspect(top_k=2, hidden_layers=(1,), loop_scores=True),
    )
    steps, trace = list(run), run.trace()
    assert trace.alternatives == tuple(step.alternatives for step in steps)
    assert trace.margins == tuple(step.margin for step in steps)
    assert trace.loop_scores == tuple(step.loop_scores for step in steps)
    assert trace.hidden[1].shape == (len(steps), 128)
    for step, row in zip(steps, trace.hidden[1], strict=True):
        assert np.isnan(row).all() if step.is_injected else (row == step.hidden[1]).all()
    assert any(step.is_injected for step in steps)
    trace.save(tmp_path / "trace.jsonl")
    found = type(trace).load(tmp_path / "trace.jsonl")
    assert found == trace
    np.testing.assert_array_equal(found.hidden[1], trace.hidden[1])


@pytest.mark.parametrize("cut", [1, 17])
def test_a_resumed_run_has_seen_what_an_unbroken_one_saw(cut: int, reasoner: Reasoner, tmp_path: Path) -> None:
    inspect = Inspect(top_k=3, hidden_layers=(0, 2), loop_scores=True)
    whole = started(reasoner, inspect)
    steps = list(whole)
    run = started(reasoner, inspect)
    first = [next(run) for _ in range(cut)]
    run.save(tmp_path / "run")
    resumed = reasoner.resume(tmp_path / "run")
    assert first + list(resumed) == steps
    expected, found = whole.trace(), resumed.trace()
    for name in ("alternatives", "margins", "loop_scores"):
        assert getattr(found, name) == getattr(expected, name), name
    for layer in (0, 2):
        np.testing.assert_array_equal(found.hidden[layer], expected.hidden[layer])
    plain = reasoner.resume(tmp_path / "run", inspect=Inspect())
    assert [step.id for step in plain] == [step.id for step in steps[cut:]] and plain.trace().alternatives == ()


def test_without_entropy_ids_and_logprobs_are_the_same_and_a_checkpoint_remembers_it(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    plain, bare = started(reasoner, None, n=12), started(reasoner, Inspect(entropy=False), n=12)
    expected = [(step.id, step.logprob) for step in plain]
    steps = [next(bare) for _ in range(5)]
    bare.save(tmp_path / "run")
    steps += list(reasoner.resume(tmp_path / "run"))
    assert [(step.id, step.logprob) for step in steps] == expected
    assert all(step.entropy is None for step in steps)
    assert None not in plain.trace().entropies
