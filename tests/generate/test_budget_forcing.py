"""The answer is asked for at the end of a sentence, once, with ids the model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import tokenizer_json, write_json

from qwq_mlx.generate.budget_forcing import BudgetForcing, cue_ids
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.options import CUE_PATIENCE, Limits, Sampling, Thinking
from qwq_mlx.reasoning.profile import find_profile
from qwq_mlx.trace.trace import Step

CUE = find_profile("qwq-preview").cue


def step(text: str) -> Step:
    return Step(index=0, id=0, text=text, logprob=0.0, entropy=0.0, segment="thinking")


def first_due(asking: BudgetForcing, texts: list[str]) -> int | None:
    """After how many tokens the cue is due; None if never."""
    found = [n for n, text in enumerate(texts, start=1) if asking.feed(step(text), "thinking") is not None]
    assert len(found) <= 1, "asked for once"
    return found[0] if found else None


HALF = CUE_PATIENCE // 2


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([" a", " b", " c", ".\n", "\n", " d"], 5),  # a paragraph ends: at once
        ([" a.\n\n", " b", " c", "\n", " \n", "d"], 5),
        ([" a", " b", " c", ".\n", " d"], None),  # a line: not yet
        ([" a"] * HALF + [" b", " c", " d", ".", " e", "f"], HALF + 4),
        ([" a"] * HALF + [" b", " c", " 3", ".", "14", ".\n", "x"], HALF + 6),  # the point of a number
        ([" a"] * HALF + [" b", " c", " d", "好。", "d"], HALF + 4),
        ([" a"] * HALF + [" b", " c", " d", "", '?"', " x", "x"], HALF + 5),
    ],
)
def test_the_cut_waits_for_a_good_place(texts: list[str], expected: int | None) -> None:
    assert first_due(BudgetForcing(Thinking(think_tokens=3)), texts) == expected


def test_the_cut_waits_no_longer_than_its_patience() -> None:
    assert first_due(BudgetForcing(Thinking(think_tokens=10)), [" word"] * 300) == 10 + CUE_PATIENCE
    asking = BudgetForcing(Thinking())
    assert first_due(asking, [" word"] * 300) is None
    asking.ask("answered")
    assert first_due(asking, [" word"] * 300) == CUE_PATIENCE


def test_the_first_reason_stays_and_an_answer_begun_is_left_alone() -> None:
    asking = BudgetForcing(Thinking(think_tokens=2))
    asking.ask("answered")
    assert [asking.feed(step(text), "thinking") for text in ("a", "b", "c\n", "\n", "\n\n")] == [
        None,
        None,
        None,
        "answered",
        None,
    ]
    begun = BudgetForcing(Thinking(think_tokens=1))
    assert [begun.feed(step("x\n"), "answer") for _ in range(100)] == [None] * 100


@pytest.mark.parametrize(("after", "gap"), [("", "\n\n"), ("a", "\n\n"), ("a\n", "\n"), ("\n", "\n"), ("\n\n", "")])
def test_the_cue_stands_in_a_paragraph_of_its_own(after: str, gap: str, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    tokenizer = load_tokenizer(tmp_path, vocab_size=1000)
    ids = cue_ids(tokenizer, find_profile("qwq-preview"), after=after)
    assert tokenizer.hf.decode(ids) == gap + CUE


def test_a_tag_in_the_cue_is_its_control_id(tmp_path: Path) -> None:
    content = tokenizer_json()
    added = dict(content["added_tokens"][-1])
    tags = [{**added, "id": 400 + n, "content": tag, "special": False} for n, tag in enumerate(("<think>", "</think>"))]
    write_json(tmp_path / "tokenizer.json", content | {"added_tokens": content["added_tokens"] + tags})
    tokenizer = load_tokenizer(tmp_path, vocab_size=1000)
    assert cue_ids(tokenizer, find_profile("qwq-tagged"), after="\n\n")[0] == tokenizer.added["</think>"]


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def options(reasoner: Reasoner, **thinking: Any) -> dict[str, Any]:
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))
    return {
        "sampling": Sampling(temperature=0.9, seed=3, logit_bias=never_stop),
        "limits": Limits(max_tokens=200),
        "thinking": Thinking(**thinking),
    }


@pytest.mark.tiny
def test_a_spent_budget_asks_for_the_answer_and_says_so(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", **options(reasoner, think_tokens=30, answer_tokens=20))
    steps = list(run)
    trace = run.trace()
    (injection,) = trace.injections
    assert 30 <= injection.start < 30 + CUE_PATIENCE + 1 and injection.reason == "budget"
    assert injection.text.strip() == CUE.strip()
    assert trace.finish_reason == "budget"
    assert trace.detail == f"the answer was asked for after {injection.start} tokens; the answer was cut at 20 tokens"
    assert len(trace.ids) == injection.end + 20
    injected = [step for step in steps if step.is_injected]
    assert [step.index for step in injected] == list(range(injection.start, injection.end))
    assert all(step.logprob is None and step.entropy is None for step in injected)
    assert "".join(step.text for step in steps) == trace.text == reasoner.decode(list(trace.ids))
    assert trace.conclusion_span is not None and injection.start <= trace.conclusion_span[0] < injection.end
    assert trace.conclusion.startswith(CUE.strip())
    unbounded = reasoner.generate("x", **options(reasoner))
    assert unbounded.ids[: injection.start] == trace.ids[: injection.start], "until the cut nothing is different"


@pytest.mark.tiny
def test_a_budget_of_nothing_asks_at_once(reasoner: Reasoner) -> None:
    trace = reasoner.generate("x", **options(reasoner, think_tokens=0, answer_tokens=5))
    assert trace.text.startswith(CUE) and trace.injections[0].start == 0 and len(trace.injections) == 1
    assert len(trace.ids) == trace.injections[0].end + 5


@pytest.mark.tiny
def test_a_running_thought_can_be_asked_for_its_answer(reasoner: Reasoner) -> None:
    run = reasoner.stream("x", **options(reasoner, answer_tokens=4))
    first = [next(run) for _ in range(7)]
    run.answer_now()
    rest = list(run)
    trace = run.trace()
    assert len(first) + len(rest) == len(trace.ids)
    assert trace.finish_reason == "answered"
    assert 7 < trace.injections[0].start <= 7 + CUE_PATIENCE + 1


@pytest.mark.tiny
def test_a_cue_that_does_not_fit_is_left_out(reasoner: Reasoner) -> None:
    given = options(reasoner, think_tokens=0) | {"limits": Limits(max_tokens=3)}
    trace = reasoner.generate("x", **given)
    assert (trace.injections, trace.finish_reason, len(trace.ids)) == ((), "length", 3)


@pytest.mark.tiny
def test_a_stop_text_in_the_cue_ends_the_run_there(reasoner: Reasoner) -> None:
    given = options(reasoner, think_tokens=0) | {"limits": Limits(stop=("Answer",))}
    trace = reasoner.generate("x", **given)
    assert trace.text == "**Final "
    assert len(trace.logprobs) == len(trace.ids) == trace.injections[0].end
