"""One engine for one row and for many: a row's ids, texts and traces are the same alone and beside any others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.speculative import Draft, Drafts
from qwq_mlx.generate.finish import trace_of
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.running import Running, advance
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    """Heads of 64, which a quantized cache needs."""
    return load(write_tiny_checkpoint(tmp_path_factory.mktemp("rows") / "model", n_heads=2, n_kv_heads=1))


def requests(reasoner: Reasoner) -> dict[str, dict[str, Any]]:
    """One request for each feature that has a state of its own."""
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")

    def sampling(**more: Any) -> Sampling:
        return Sampling(**{"temperature": 0.9, "seed": 3, "logit_bias": never_stop} | more)

    return {
        "greedy": {"sampling": sampling(temperature=0.0)},
        "penalties": {"sampling": sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)},
        "dry": {"sampling": sampling(dry_multiplier=0.8, top_k=20)},
        "mask": {"sampling": sampling(seed=4, temperature=2.0), "limits": Limits(max_tokens=60, language_guard=True)},
        "bans": {"sampling": sampling(), "limits": Limits(max_tokens=50, banned=("e", "zb"))},
        "budget": {
            "sampling": sampling(),
            "limits": Limits(max_tokens=110),
            "thinking": Thinking(think_tokens=5, answer_tokens=9),
        },
        "at once": {"sampling": sampling(seed=8), "thinking": Thinking(think_tokens=0, answer_tokens=9)},
        "nudge": {
            "sampling": sampling(temperature=0.0, logit_bias=never_stop | {letter: 12.0}),
            "limits": Limits(max_tokens=220),
            "thinking": Thinking(on_loop="nudge"),
        },
        "inspect": {
            "sampling": sampling(seed=9),
            "inspect": Inspect(top_k=3, hidden_layers=(0, 2), loop_scores=True),
        },
        "processor": {
            "sampling": sampling(seed=10),
            "logits_processors": [lambda tokens, logits: logits.at[:, tokens].add(-1.0)],
        },
        "quantized cache": {"sampling": sampling(seed=11), "limits": Limits(max_tokens=40, kv_bits=8)},
        "stops early": {"sampling": Sampling(temperature=0.9, seed=12), "limits": Limits(max_tokens=40, stop=("t",))},
    }


QUESTIONS = ("x", "How many r in strawberry?", "3 + 4 * 5", "a longer question, of other length 数")


def streams(reasoner: Reasoner, names: Sequence[str]) -> list[Stream]:
    every = requests(reasoner)
    places = {name: place for place, name in enumerate(every)}
    return [
        reasoner.stream(QUESTIONS[places[name] % 4], **({"limits": Limits(max_tokens=40)} | every[name]))
        for name in names
    ]


def together(reasoner: Reasoner, names: Sequence[str], late: int = 0, drafts: Drafts | None = None) -> list[Trace]:
    """Their traces from one decoder; the last `late` rows enter while the others are under way."""
    decoder = Decoder(reasoner.model.module, n_ids=reasoner.model.tokenizer.n_ids, drafts=drafts)
    running = [Running(stream.request, decoder) for stream in streams(reasoner, names)]
    waiting = running[len(running) - late :] if late else []
    active: list[Running] = []
    n_steps = 0
    for each in running:
        if each not in waiting:
            active.append(_prefilled(each))
    while waiting or any(each.run.finish is None for each in active):
        advance(decoder, active)
        n_steps += 1
        if waiting and n_steps % 7 == 0:
            active.append(_prefilled(waiting.pop(0)))
    return [trace_of(each.run, timings=each.clock.timings(), peak_bytes=0) for each in running]


def _prefilled(running: Running) -> Running:
    for _ in running.prefill(running.run.request.prompt_ids):
        pass
    return running


@pytest.fixture(scope="module")
def alone(reasoner: Reasoner) -> dict[str, Trace]:
    traces = {}
    for name in requests(reasoner):
        (stream,) = streams(reasoner, [name])
        assert [step.id for step in stream if step.index >= 0]
        traces[name] = stream.trace()
    return traces


def assert_same(found: Trace, expected: Trace, name: str) -> None:
    assert found.ids == expected.ids, name
    assert (found.texts, found.finish_reason, found.detail) == (expected.texts, expected.finish_reason, expected.detail)
    assert (found.injections, found.events, found.answer) == (expected.injections, expected.events, expected.answer)
    assert [[each.id for each in step] for step in found.alternatives] == [
        [each.id for each in step] for step in expected.alternatives
    ]
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for layer, rows in expected.hidden.items():
        assert mx.allclose(mx.array(found.hidden[layer]), mx.array(rows), atol=1e-4, equal_nan=True)


def test_the_features_show(alone: dict[str, Trace]) -> None:
    """Each request does what it is here for, or the comparisons would prove nothing."""
    assert alone["bans"].ids != alone["budget"].ids and "e" not in alone["bans"].text
    assert alone["budget"].injections and alone["at once"].injections[0].start == 0
    assert any(event.get("action") == "nudge" for event in alone["nudge"].events)
    assert len(alone["inspect"].hidden) == 2 and alone["stops early"].finish_reason == "stop"
    assert len({trace.ids for trace in alone.values()}) == len(alone)


def test_two_rows_are_what_they_are_alone(reasoner: Reasoner, alone: dict[str, Trace]) -> None:
    """Each feature beside another; all 66 pairs gave the same, and all 12 together are below."""
    every = list(requests(reasoner))
    for names in zip(every[:6], every[6:], strict=True):
        for name, trace in zip(names, together(reasoner, names), strict=True):
            assert_same(trace, alone[name], f"{name} of {names}")


@pytest.mark.parametrize("late", [0, 11])
def test_all_rows_together_are_what_they_are_alone_whenever_they_enter(
    reasoner: Reasoner, alone: dict[str, Trace], late: int
) -> None:
    names = list(requests(reasoner))
    for name, trace in zip(names, together(reasoner, names, late), strict=True):
        assert_same(trace, alone[name], name)


def test_a_row_that_fails_ends_alone(reasoner: Reasoner, alone: dict[str, Trace]) -> None:
    """Its hook raises, or gives NaN, under way; the others write what they write alone."""

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size - n_prompt > 6:
            raise ValueError("a mistake in a hook")
        return logits

    names = ("greedy", "dry", "inspect")
    [failing] = streams(reasoner, ["penalties"])
    n_prompt = len(failing.request.prompt_ids)
    decoder = Decoder(reasoner.model.module, n_ids=reasoner.model.tokenizer.n_ids)
    request = replace(failing.request, logits_processors=(broken,))
    running = [Running(each, decoder) for each in [request, *(stream.request for stream in streams(reasoner, names))]]
    for each in running:
        _prefilled(each)
    while any(each.run.finish is None for each in running):
        advance(decoder, running)
    assert isinstance(running[0].failure, ValueError) and running[0].run.finish is not None
    assert running[0].run.finish[0] == "interrupted" and len(running[0].run.steps) == 7
    for name, each in zip(names, running[1:], strict=True):
        assert_same(trace_of(each.run, timings=each.clock.timings(), peak_bytes=0), alone[name], name)


class Oracle:
    """Drafts of random lengths from the ids that a row writes alone, each of their ids wrong with some probability."""

    def __init__(self, alone: Iterable[Trace], *, wrong: float) -> None:
        self._known = {self._key(trace.prompt_ids, trace.settings): trace.ids for trace in alone}
        self._random = Random(5)
        self._wrong = wrong
        self.n_drafted = self.n_accepted = self.n_passes = 0

    @staticmethod
    def _key(prompt_ids: Sequence[int], settings: Any) -> Any:
        return tuple(prompt_ids), settings["sampling"]["seed"], settings["limits"]["max_tokens"]

    def is_due(self, rows: Sequence[Row]) -> bool:
        return self._random.random() < 0.8

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        self.n_passes += 1
        drafts = []
        for row in rows:
            longest = min(row.most_drafts, self._random.randrange(7), 99 if most is None else most)
            key = tuple(row.ids[: row.n_prompt]), row.sampler._seed, row.max_tokens
            known = self._known[key][row.n_output :][:longest]
            ids = [each if self._random.random() >= self._wrong else (each + 1) % 256 for each in known]
            most = None if most is None else most - len(ids)
            drafts.append(Draft(tuple(ids), "oracle"))
        return drafts

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        self.n_drafted += len(draft.ids)
        self.n_accepted += n_accepted


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_drafts_right_or_wrong_change_nothing_of_a_row_alone(
    reasoner: Reasoner, alone: dict[str, Trace], wrong: float
) -> None:
    """Nor of its log-probabilities, to the last bit: a place of a pass is computed as plain decoding computes it."""
    for name, expected in alone.items():
        oracle = Oracle(alone.values(), wrong=wrong)
        [trace] = together(reasoner, [name], drafts=oracle)
        assert_same(trace, expected, name)
        assert trace.logprobs == expected.logprobs and trace.entropies == expected.entropies, name
        if name == "processor":
            assert oracle.n_drafted == 0  # a hook of the user's sees each token once
        elif wrong in (0.0, 1.0):
            share = oracle.n_accepted / oracle.n_drafted
            assert oracle.n_drafted > 5 and (share < 0.1 if wrong else share > 0.6), (name, share)


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_rows_with_drafts_of_their_own_share_a_pass(reasoner: Reasoner, alone: dict[str, Trace], wrong: float) -> None:
    for names in (["greedy", "dry", "mask"], list(requests(reasoner))[:6], list(requests(reasoner))):
        oracle = Oracle(alone.values(), wrong=wrong)
        for name, trace in zip(names, together(reasoner, names, 2, drafts=oracle), strict=True):
            assert_same(trace, alone[name], name)
        assert oracle.n_accepted > 5


def test_many_rows_get_the_bits_of_a_row_alone_where_that_is_asked_for(reasoner: Reasoner) -> None:
    """Log-probabilities show the bits: nine rows take BLAS, which rounds otherwise, unless they are to be alike."""
    settings: dict[str, Any] = {"limits": Limits(max_tokens=24), "sampling": Sampling(temperature=0.9, seed=3)}
    alone = [reasoner.batch_generate([f"{n} + 1"], **settings)[0] for n in range(9)]
    seeds = [replace(settings["sampling"], seed=trace.settings["sampling"]["seed"]) for trace in alone]

    for reproducible in (True, False):
        wide = Reasoner(replace(reasoner.model, reproducible=reproducible))
        beside = wide.batch_generate([f"{n} + 1" for n in range(9)], width=9, limits=settings["limits"], sampling=seeds)
        assert all(a.logprobs == b.logprobs for a, b in zip(alone, beside, strict=True)) is reproducible


def test_a_cache_that_is_kept_for_the_next_prompt_does_not_keep_those_beside_it(
    reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch of rows, as on a GPU: a server keeps some caches for long."""
    runs = [
        reasoner.stream(text, sampling=Sampling(temperature=0), limits=Limits(max_tokens=n_tokens))
        for text, n_tokens in (("one", 6), ("another", 9), ("a third", 9))
    ]
    batches: set[int] = set()
    with Scheduler(reasoner.model, width=3, planned_bytes=0, releases=False) as scheduler:
        monkeypatch.setattr(scheduler._decoder._runner, "_batches_from", 1)
        for run in runs:
            scheduler.add(run)
        while scheduler.streams:
            scheduler.step()
            batches |= {id(run.running.row.cache[0].batch) for run in runs if run.running.row.cache[0].batch}
    assert batches, "they did attend in a batch"
    assert all(layer.batch is None for run in runs for layer in run.running.row.cache)
    more = {"sampling": Sampling(temperature=0), "limits": Limits(max_tokens=5)}
    following = reasoner.stream("one and more", before=runs[0], **more)
    assert following.n_cached > 1
    assert [step.id for step in following] == list(reasoner.generate("one and more", **more).ids)
    assert reasoner.stream("one", before=runs[0], **more).n_cached == 0  # its cache went already
