"""Many questions side by side: the traces are those of one question after another, in any width."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.errors import BatchError, FitError, OptionError, PromptError
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny

QUESTIONS = ("x", "How many r in strawberry?", "3 + 4 * 5", "a question 数", "y", "z z z")
SAMPLING = Sampling(temperature=1.0, seed=7)
LIMITS = tuple(
    Limits(max_tokens=n, prefill_step=step) for n, step in ((9, 2048), (40, 3), (1, 5), (25, 8), (33, 2), (5, 1))
)


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def unmeasured(trace: Trace) -> dict[str, Any]:
    """All but times and memory, and the numbers that rounding may change."""
    measured = {"timings", "peak_bytes", "logprobs", "entropies"}
    return {name: value for name, value in trace.to_json().items() if name not in measured}


@pytest.fixture(scope="module")
def alone(reasoner: Reasoner) -> list[Trace]:
    return [
        reasoner.generate(question, sampling=replace(SAMPLING, seed=question_seed(7, index)), limits=LIMITS[index])
        for index, question in enumerate(QUESTIONS)
    ]


@pytest.mark.parametrize("width", [1, 2, 4, None])
def test_the_traces_are_those_of_one_question_after_another(
    reasoner: Reasoner, alone: list[Trace], width: int | None
) -> None:
    told: list[tuple[int, int]] = []
    traces = reasoner.batch_generate(
        QUESTIONS, sampling=SAMPLING, limits=LIMITS, width=width, progress=lambda *each: told.append(each)
    )
    assert [unmeasured(trace) for trace in traces] == [unmeasured(trace) for trace in alone]
    assert told == sorted(told) and told[-1] == (6, sum(len(trace.ids) for trace in alone))


def test_a_terminal_shows_a_bar_unless_the_caller_shows_progress(
    reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*, is_terminal: bool, progress: Callable[[int, int], None] | None = None) -> str:
        with monkeypatch.context() as patched:
            stderr = io.StringIO()
            patched.setattr(stderr, "isatty", lambda: is_terminal)
            patched.setattr(sys, "stderr", stderr)
            reasoner.batch_generate(["x", "y"], sampling=SAMPLING, limits=Limits(max_tokens=3), progress=progress)
        return stderr.getvalue()

    states = told(is_terminal=True).split("\r")
    assert re.search(r"answering:   0%\|.* 0/2 \[00:00<\?, ", states[1])
    assert re.search(r"answering: 100%\|.* 2/2 \[.*question.*, [\d,]+\.\d tok/s\]\n", states[-1])
    assert told(is_terminal=False) == told(is_terminal=True, progress=lambda n_ended, n_tokens: None) == ""


def test_a_run_that_has_ended_holds_no_cache(reasoner: Reasoner) -> None:
    limits = Limits(max_tokens=3)
    two = reasoner.batch_generate(["x", "y"], sampling=SAMPLING, limits=limits, width=1)
    many = reasoner.batch_generate(["x", "y"] * 12, sampling=SAMPLING, limits=limits, width=1)
    # a cache of each would be a multiple; when MLX frees a buffer differs from run to run
    assert many[-1].peak_bytes < 1.1 * two[-1].peak_bytes


def test_one_setting_each_and_seeds_of_ones_own(reasoner: Reasoner) -> None:
    samplings = [Sampling(temperature=0.0), Sampling(temperature=1.5, seed=3, top_k=0, top_p=1.0)]
    thinking = [Thinking(), Thinking(think_tokens=4, answer_tokens=6)]
    limits = Limits(max_tokens=30)
    found = reasoner.batch_generate(["x", "x"], sampling=samplings, thinking=thinking, limits=limits)
    for trace, own, budget in zip(found, samplings, thinking, strict=True):
        assert trace.ids == reasoner.generate("x", sampling=own, thinking=budget, limits=limits).ids
    first, second = reasoner.batch_generate(["x", "x"], sampling=SAMPLING, limits=limits)
    assert first.ids != second.ids, "a seed for all is not one draw for all"
    assert reasoner.batch_generate([]) == []


def test_a_question_that_fails_ends_alone_and_is_named(reasoner: Reasoner) -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > n_first + 4:  # the first prompt is the shorter one, so only the second row has as many
            raise ValueError("a mistake in a hook")
        return logits

    n_first = len(reasoner.stream("x").request.prompt_ids)
    limits = [Limits(max_tokens=3), Limits(max_tokens=20)]
    with pytest.raises(
        BatchError, match=r"1 of 2 questions were not answered to their end\. question 1: ValueError: a mist"
    ) as told:
        reasoner.batch_generate(["x", "xx"], sampling=SAMPLING, limits=limits, logits_processors=[broken])
    assert list(told.value.failures) == [1]
    first = told.value.traces[0]
    assert isinstance(first, Trace) and len(first.ids) == 3


def test_what_cannot_be_is_refused_before_any_work(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="width is 0, expected a whole number from 1 to 1,000"):
        reasoner.batch_generate(["x"], width=0)
    with pytest.raises(OptionError, match="limits has 1 entries for 2 questions, expected one for all or one each"):
        reasoner.batch_generate(["x", "y"], limits=[Limits()])
    with pytest.raises(PromptError):
        reasoner.batch_generate(["x", ""])
    need = reasoner.fit(Limits()).plan.peak_bytes + 600_000_000
    monkeypatch.setattr(reasoner, "limit_bytes", need)
    with pytest.raises(FitError, match=r"500 rows side by side do not fit(.|\n)*The largest `width` that fits is \d+;"):
        reasoner.batch_generate(["x"] * 500, width=500)
