"""Votes: the samples are single runs with seeds of their own, and what is not needed any more is not drawn."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.engine import kv_cache
from qwq_mlx.errors import BatchError, FitError, OptionError, PromptError
from qwq_mlx.generate import __main__ as generate
from qwq_mlx.generate import batch, stream, vote
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.vote import Voting, posterior
from qwq_mlx.generate.vote_plot import plot_vote
from qwq_mlx.options import Limits, Sampling

SAMPLING, LIMITS = Sampling(temperature=1.0, seed=7), Limits(max_tokens=25, prefill_step=8)
STAGGERED = replace(LIMITS, stop=("X",))  # the samples end after 5, 3, 13, 25 and 25 tokens


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def seeded(index: int, sampling: Sampling = SAMPLING) -> Sampling:
    return replace(sampling, seed=question_seed(sampling.seed or 0, index))


@pytest.mark.tiny
def test_a_sample_is_the_run_with_its_seed_in_any_width(reasoner: Reasoner) -> None:
    alone = [
        reasoner.generate("3 + 4 * 5", sampling=seeded(index), limits=LIMITS, ask_answer=True) for index in range(4)
    ]
    for width in (1, 3, None):
        vote = reasoner.vote("3 + 4 * 5", n=4, sampling=SAMPLING, limits=LIMITS, width=width)
        assert [trace.ids for trace in vote.traces] == [trace.ids for trace in alone], width
        assert [trace.settings for trace in vote.traces] == [trace.settings for trace in alone]
        assert [trace.asked for trace in vote.traces] == [trace.asked for trace in alone], width
        assert vote.n_tokens == sum(len(trace.ids) + trace.asked_tokens for trace in alone)
        assert (vote.stopped, vote.n_tokens_saved, len({trace.ids for trace in alone})) == ("", 0, 4)


@pytest.mark.tiny
def test_a_vote_from_the_middle_of_a_run_shares_its_beginning_and_leaves_it_alone(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", sampling=SAMPLING, limits=LIMITS)
    first = [next(run) for _ in range(12)]
    vote = reasoner.vote(run, n=3, at=5, ask_answer=False)
    forks = [run.fork(at=5, seed=question_seed(7, index)) for index in range(3)]
    for fork in forks:
        list(fork)
    assert [trace.ids for trace in vote.traces] == [fork.trace().ids for fork in forks]
    assert {trace.ids[:5] for trace in vote.traces} == {tuple(step.id for step in first[:5])}
    assert vote.n_tokens == sum(len(trace.ids) - 5 for trace in vote.traces)
    whole = [*first, *run]
    assert [step.id for step in whole] == list(reasoner.generate("x", sampling=SAMPLING, limits=LIMITS).ids)
    assert [len(t.ids) for t in reasoner.vote(run, n=2, at=0, ask_answer=False).traces] == [25, 25]


@pytest.mark.tiny
def test_a_long_beginning_is_in_memory_once_and_the_ids_are_those_of_runs_alone(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt, and of a trace whose own run goes on; forks that copy are the slow twin."""
    reasoner = load(known_checkpoint)
    limits = replace(LIMITS, prefill_step=64)
    question = "3 + 4 * 5 is what? " * 14
    alone = [reasoner.generate(question, sampling=seeded(index), limits=limits, ask_answer=True) for index in range(3)]
    vote = reasoner.vote(question, n=3, sampling=SAMPLING, limits=limits, stop_early=False)
    assert [trace.ids for trace in vote.traces] == [trace.ids for trace in alone]
    assert [trace.asked for trace in vote.traces] == [trace.asked for trace in alone]

    run = reasoner.stream(question, sampling=SAMPLING, limits=limits)
    first = [next(run) for _ in range(20)]
    n_prompt = len(run.request.prompt_ids)
    forks = [run.fork(at=12, seed=seed) for seed in (5, 6)]
    layers = [fork.running.row.cache[0] for fork in forks]
    assert layers[0].prefix is layers[1].prefix is not None and layers[0].n_shared == n_prompt + 11
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 10_000)
    copies = [run.fork(at=12, seed=seed) for seed in (5, 6)]
    assert all(copy.running.row.cache[0].prefix is None for copy in copies)
    for fork, copy in zip(forks, copies, strict=True):
        assert [step.id for step in fork] == [step.id for step in copy]
        assert fork.trace().ids[:12] == tuple(step.id for step in first[:12])
    whole = [step.id for step in (*first, *run)]
    assert whole == list(reasoner.generate(question, sampling=SAMPLING, limits=limits).ids)


@pytest.mark.tiny
def test_more_samples_fit_behind_a_prompt_that_is_held_once(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is that of the run's cache and of what each sample writes."""
    reasoner = load(known_checkpoint)
    run = reasoner.stream("3 + 4 * 5 is what? " * 14, limits=LIMITS)
    shared = Voting(run, 8, width=8)._planned_bytes
    reserve = run.request.plan.reserve_bytes
    Voting(run, 8, width=8, limit_bytes=shared + reserve)
    monkeypatch.setattr(vote, "MIN_SHARED", 10_000)
    monkeypatch.setattr(batch, "MIN_SHARED", 10_000)
    n_shared, copies = len(run.request.prompt_ids) - 1, Voting(run, 8, width=8)._planned_bytes
    copied = 8 * n_shared * run.request.plan.kv_bytes_per_token // reasoner.model.config.num_hidden_layers
    assert copies - shared + copied >= 7 * n_shared * run.request.plan.kv_bytes_per_token
    with pytest.raises(FitError, match=r"The largest `width` that fits is [1-7];"):
        Voting(run, 8, width=8, limit_bytes=shared + reserve)


@pytest.mark.tiny
def test_samples_from_far_back_in_a_run_are_planned_beside_all_of_it(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a copy of its beginning, for the run itself keeps its own."""
    run = load(known_checkpoint).stream("3 + 4 * 5 is what? " * 14, limits=LIMITS)
    for _ in range(5):
        next(run)
    near = Voting(run, 2, at=0, width=2)._planned_bytes
    monkeypatch.setattr(vote, "CACHE_STEP", 3)
    n_shared = len(run.request.prompt_ids) - 1
    copied = Voting(run, 2, at=0, width=2)._planned_bytes - near
    assert copied == n_shared * run.request.plan.kv_bytes_per_token


@pytest.mark.tiny
def test_the_picture_of_a_vote_has_a_line_for_each_answer(
    reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    answering(monkeypatch, ["$7", "$7", "8"])
    vote = reasoner.vote("x", n=3, sampling=SAMPLING, limits=LIMITS, stop_early=False)

    plot_vote(vote, tmp_path / "vote.svg")

    svg = (tmp_path / "vote.svg").read_text()
    for text in ("2: $7", "1: 8", "samples", "3 of 3 samples, agreement 67%, 0 tokens saved of"):
        assert f"<!-- {text}" in svg, text  # matplotlib writes each text it draws as a comment beside its outline
    with pytest.raises(OptionError, match="no answers, so there is nothing to draw"):
        plot_vote(replace(vote, groups=()), tmp_path / "none.svg")


def answering(monkeypatch: pytest.MonkeyPatch, answers: Iterable[str | None]) -> None:
    """Let the samples have these answers, in the order in which they end."""
    trace_of, to_come, chosen = stream.trace_of, iter(answers), dict[object, str | None]()

    def answered(run: Any, **others: Any) -> Any:
        trace = trace_of(run, **others)
        if trace.finish_reason != "interrupted" and run not in chosen:
            chosen[run] = next(to_come)
        return replace(trace, answer=chosen.get(run), confidence=0.9)

    monkeypatch.setattr(stream, "trace_of", answered)


@pytest.mark.tiny
def test_what_cannot_change_the_answer_is_not_drawn(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [reasoner.generate("x", sampling=seeded(index), limits=STAGGERED) for index in range(5)]
    answering(monkeypatch, itertools.repeat("7"))
    told: list[tuple[int, int]] = []
    vote = reasoner.vote(
        "x",
        n=5,
        sampling=SAMPLING,
        limits=STAGGERED,
        width=2,
        progress=lambda place, _, groups: told.append((place, len(groups[0].samples))),
    )
    assert (vote.answer, vote.agreement, vote.stopped, told) == ("7", 1.0, "lead", [(1, 1), (0, 2), (2, 3)])
    assert [trace.finish_reason for trace in vote.traces] == ["stop"] * 3 + ["interrupted"], "the last never began"
    assert 0 < len(vote.traces[3].ids) < 25
    for trace, whole in zip(vote.traces, alone, strict=False):
        assert trace.ids == whole.ids[: len(trace.ids)]
    assert vote.n_tokens_saved == 2 * (5 + 3 + 13) / 3 - len(vote.traces[3].ids)
    sure = reasoner.vote("x", n=9, sampling=SAMPLING, limits=LIMITS, width=1, confidence=0.9, stop_early=False)
    assert (sure.stopped, len(sure.traces), sure.posterior) == ("confidence", 3, 0.9375)
    whole_vote = reasoner.vote("x", n=3, sampling=SAMPLING, limits=LIMITS, stop_early=False)
    assert (whole_vote.stopped, len(whole_vote.groups[0].samples)) == ("", 3)


@pytest.mark.tiny
def test_a_lead_that_could_still_be_equalled_decides_nothing(
    reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, ["7", "7", "8", "8"])
    vote = reasoner.vote("x", n=4, limits=Limits(max_tokens=1), width=1)
    assert (vote.stopped, vote.answer, vote.agreement, vote.posterior) == ("", "7", 0.5, 0.5)


@pytest.mark.tiny
def test_answers_that_say_the_same_are_one_group(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ["1/2", "7", "0.5", None, "\\frac{1}{2}", "7.0"])
    vote = reasoner.vote("x", n=6, limits=Limits(max_tokens=1), width=1, ask_answer=False, stop_early=False)
    assert [(group.answer, group.samples) for group in vote.groups] == [("1/2", (0, 2, 4)), ("7", (1, 5))]
    assert (vote.answer, vote.agreement, vote.posterior) == ("1/2", 0.5, posterior(3, 2))
    assert vote.to_json()["groups"][1] == {"answer": "7", "samples": [1, 5]}


@pytest.mark.tiny
def test_a_sample_that_fails_ends_alone(reasoner: Reasoner) -> None:
    seen: list[int] = []

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.size)
        if len(seen) == 5 or fails_always:
            raise ValueError("a mistake in a hook")
        return logits

    fails_always = False
    run = reasoner.stream("x", sampling=SAMPLING, limits=LIMITS, logits_processors=[broken])
    vote = reasoner.vote(run, n=3, width=2, ask_answer=False)
    [(place, reason)] = vote.failures.items()
    assert reason == "ValueError: a mistake in a hook"
    assert [len(trace.ids) == 25 for trace in vote.traces] == [index != place for index in range(3)]
    fails_always = True
    with pytest.raises(BatchError, match="All 3 samples failed") as told:
        reasoner.vote(run, n=3, width=2)
    assert sorted(told.value.failures) == [0, 1, 2]


@pytest.mark.tiny
def test_what_cannot_be_is_refused_before_any_work(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (0, -1, 1_001, True, 2.0):
        with pytest.raises(OptionError, match="expected a whole number of samples from 1 to 1,000"):
            reasoner.vote("x", n=n)  # type: ignore[arg-type]
    for confidence in (0.5, 1.0, float("nan"), "x"):
        with pytest.raises(OptionError, match=r"expected a number above 0\.5 and below 1"):
            reasoner.vote("x", confidence=confidence)  # type: ignore[arg-type]
    run = reasoner.stream("x", limits=LIMITS)
    with pytest.raises(OptionError, match=r"at is 3, expected from 0 \(the prompt\) to 0"):
        reasoner.vote(run, at=3)
    with pytest.raises(OptionError, match="A vote from a run has its settings"):
        reasoner.vote(run, sampling=SAMPLING)
    with pytest.raises(OptionError, match="`at` is a place in the output of a run"):
        reasoner.vote("x", at=0)
    with pytest.raises(PromptError):
        reasoner.vote("")
    monkeypatch.setattr(reasoner, "limit_bytes", reasoner.fit(Limits()).plan.peak_bytes + 600_000_000)
    with pytest.raises(FitError, match=r"The largest `width` that fits is \d+;"):
        reasoner.vote("x", n=500, width=500)


def test_the_posterior_is_the_mass_of_the_beta_above_a_half() -> None:
    """Against the share of draws from Beta(first + 1, second + 1) that are above 1/2."""
    rng = random.Random(0)
    for first, second in ((0, 0), (3, 0), (4, 2), (9, 8)):
        above = sum(rng.betavariate(first + 1, second + 1) > 0.5 for _ in range(20_000)) / 20_000
        assert abs(posterior(first, second) - above) < 0.015


@pytest.mark.tiny
def test_the_command_prints_the_answer_and_how_many_agree(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "-p", "x", "--max-tokens", "3", "--seed", "7", "--width", "1"]
    answering(monkeypatch, ["7", "8\x1b[2J", *["7"] * 5])
    assert generate.main([*flags, "--samples", "4"]) == 0
    out, err = capfd.readouterr()
    assert out == "7\n3 of 4 samples agree\n"
    assert "sample 1: 8 [2J (length, 3 tokens); 1 x 7, 1 x 8 [2J\n" in err and "agreement 75%" in err
    assert generate.main([*flags, "--samples", "3", "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    voted = json.loads(out)
    assert (voted["answer"], voted["stopped"], len(voted["traces"]), err) == ("7", "lead", 2, "")
    answering(monkeypatch, [None])
    assert generate.main([*flags, "--samples", "1"]) == 1
    assert "no sample has an answer" in capfd.readouterr().err


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("n", "flags", "why"),
    [(3, ["--all-samples"], "all samples ended"), (8, ["--confidence", "0.9"], "the posterior is reached")],
)
def test_flags_say_when_a_vote_ends(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    n: int,
    flags: list[str],
    why: str,
) -> None:
    answering(monkeypatch, itertools.repeat("7"))
    short = ["--model", str(tiny_checkpoint), "-p", "x", "--max-tokens", "3", "--seed", "7", "--width", "1"]
    assert generate.main([*short, "--samples", str(n), *flags]) == 0
    out, err = capfd.readouterr()
    assert out == "7\n3 of 3 samples agree\n" and why in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples is 0, expected a whole number from 1 to 1,000"),
        *(
            (["--samples", "2", flag, "x"], f"{flag} cannot be combined with --samples yet")
            for flag in ("--save", "--resume", "--receipt", "--input")
        ),
        (["--samples", "2", "--answer-now"], "--answer-now cannot be combined with --samples yet"),
        (["--samples", "2", "--confidence", "1"], "--confidence is 1, expected a number above 0.5 and below 1"),
        (["--samples", "2", "--confidence", "0.9", "--all-samples"], "are mutually exclusive"),
        (["--all-samples"], "--all-samples and --confidence need --samples N"),
        (["--confidence", "0.9"], "--all-samples and --confidence need --samples N"),
        (["--width", "2"], "--width needs --input FILE or --samples N"),
    ],
)
def test_flags_that_a_vote_cannot_take_are_refused_before_a_model_is_looked_for(
    flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["-p", "x", "--model", "/nowhere", *flags]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.tiny
def test_a_vote_that_is_stopped_counts_what_had_ended(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, itertools.repeat("7"))
    voting = Voting(reasoner.stream("x", sampling=SAMPLING, limits=STAGGERED), 6, width=2, stop_early=False)
    vote = voting.work(lambda place, *_: voting.stop())
    assert (vote.stopped, vote.answer, vote.groups[0].samples, vote.failures) == ("interrupted", "7", (1,), {})
    assert [trace.finish_reason for trace in vote.traces] == ["interrupted", "stop"]
    stopped = Voting(reasoner.stream("x", sampling=SAMPLING, limits=LIMITS), 6)
    stopped.stop()
    assert (stopped.work().traces, stopped.work().answer) == ((), None)
