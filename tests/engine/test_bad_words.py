"""Banned texts never appear, however tokens cut them, and everything else stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Step

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


def run(reasoner: Reasoner, *banned: str, n: int = 150, seed: int = 1, **more: Any) -> Any:
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))
    return reasoner.stream(
        "x",
        sampling=Sampling(temperature=0.8, seed=seed, logit_bias=never_stop),
        limits=Limits(max_tokens=n, banned=banned),
        **more,
    )


def n_before(steps: list[Step], char: int) -> int:
    """How many tokens end before this character; those that released nothing belong to the character behind them."""
    n_chars = [len("".join(step.text for step in steps[:n])) for n in range(len(steps))]
    n_tokens = max(n for n in range(len(steps)) if n_chars[n] <= char)
    while n_tokens and not steps[n_tokens - 1].text:
        n_tokens -= 1
    return n_tokens


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_banned_texts_never_appear_and_the_text_is_the_same_until_the_first(reasoner: Reasoner, seed: int) -> None:
    plain = run(reasoner, seed=seed)
    steps = list(plain)
    text = plain.trace().text
    # three pieces of the plain text of three characters, so that they cross token borders
    banned = tuple(text[place : place + 3] for place in (40, 90, 130))
    banned = tuple(each for each in banned if "\ufffd" not in each and len(each) == 3)
    assert banned
    ours = run(reasoner, *banned, seed=seed)
    shown = ""
    for step in ours:
        shown += step.text
        assert not any(each in shown for each in banned)
    trace = ours.trace()
    n_same = n_before(steps, min(text.index(each) for each in banned))
    assert trace.ids[:n_same] == plain.trace().ids[:n_same] and trace.ids[n_same] != plain.trace().ids[n_same]
    assert len(trace.ids) == 150 == len(trace.logprobs) and trace.text == reasoner.decode(list(trace.ids))


def test_bans_that_never_come_change_nothing(reasoner: Reasoner) -> None:
    plain, guarded = run(reasoner), run(reasoner, "never written", "\x00\x01")
    assert [step.id for step in guarded] == [step.id for step in plain]
    assert guarded.trace().text == plain.trace().text


def test_a_single_letter_and_a_long_beginning_can_be_banned(reasoner: Reasoner) -> None:
    plain = run(reasoner)
    steps = list(plain)
    text = plain.trace().text
    letter = max(set(text) - {"\ufffd"}, key=text.count)
    long = text[5:60]
    guarded = run(reasoner, letter, long)
    list(guarded)
    assert letter in text and letter not in guarded.trace().text
    only_long = run(reasoner, long)
    list(only_long)
    assert long in text and long not in only_long.trace().text
    n_same = n_before(steps, text.index(long))
    assert only_long.trace().ids[:n_same] == plain.trace().ids[:n_same]


def test_an_injected_cue_follows_only_settled_tokens(reasoner: Reasoner) -> None:
    plain = run(reasoner)
    list(plain)
    text = plain.trace().text
    banned = text[30:40], text[70:73]
    guarded = run(reasoner, *banned, thinking=Thinking(think_tokens=20, answer_tokens=40))
    steps = list(guarded)
    trace = guarded.trace()
    assert [step.id for step in steps] == list(trace.ids)
    assert trace.text == reasoner.decode(list(trace.ids)) and trace.finish_reason == "budget"
    assert len(trace.ids) == trace.injections[0].end + 40
    assert guarded.running.row.ids[guarded.running.row.n_prompt :][: len(trace.ids)] == list(trace.ids)


def test_the_end_of_the_text_is_not_waited_for(reasoner: Reasoner) -> None:
    stop_id = min(reasoner.model.stop_ids)
    ours = reasoner.generate(
        "x", sampling=Sampling(temperature=0.0, logit_bias={stop_id: 1e9}), limits=Limits(banned=("abc",))
    )
    assert (ours.ids, ours.finish_reason) == ((stop_id,), "stop")
