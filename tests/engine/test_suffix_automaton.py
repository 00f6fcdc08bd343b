"""The automaton holds just the stretches of its texts, and its guesses are what followed them before."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from qwq_mlx.engine.drafters import ngram
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.suffix_automaton import ROOT, SuffixAutomaton


class Text:
    """A text as the drafter reads it from a row."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.n_restarts = 0


def is_held(automaton: SuffixAutomaton, ids: tuple[int, ...]) -> bool:
    state = ROOT
    for token_id in ids:
        if token_id not in automaton._next[state]:
            return False
        state = automaton._next[state][token_id]
    return True


def held(texts: list[list[int]], length: int) -> set[tuple[int, ...]]:
    return {tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)}


@pytest.mark.parametrize("seed", range(6))
def test_it_holds_the_stretches_of_all_texts_and_nothing_else(seed: int) -> None:
    """Texts grow in turns, so that one goes the way of another and parts from it."""
    random = Random(seed)
    texts: list[list[int]] = [[], [], []]
    ends, automaton = [ROOT] * 3, SuffixAutomaton()
    for _ in range(40):
        place = random.randrange(3)
        token_id = random.randrange(3)
        texts[place].append(token_id)
        ends[place] = automaton.add(ends[place], token_id)
    for length in range(1, 7):
        expected = held(texts, length)
        assert {each for each in product(range(3), repeat=length) if is_held(automaton, each)} == expected
    assert len(automaton) <= 2 * 40
    for text, end in zip(texts, ends, strict=True):
        assert automaton._length[end] == len(text)  # the state of the whole text


def test_it_guesses_what_followed_the_longest_ending_seen_before() -> None:
    automaton, end = SuffixAutomaton(), ROOT
    for token_id in [1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3]:
        end = automaton.add(end, token_id)
    guess = automaton.guess(end)
    assert guess is not None and guess.id == 9 and 0 < guess.probability < 1
    assert automaton.guess(automaton.follow(end, 9)).id == 4
    assert automaton.guess(ROOT) is None and automaton.follow(end, 77) == ROOT


def test_the_latest_continuations_count_most_and_trust_follows_what_was_right() -> None:
    automaton, end = SuffixAutomaton(), ROOT
    for follower in (7, 7, 8, 8):
        for token_id in (1, 2, follower):
            end = automaton.add(end, token_id)
    assert automaton.guess(automaton.add(automaton.add(end, 1), 2)).id == 8
    random, regular, irregular = Random(1), SuffixAutomaton(), SuffixAutomaton()
    ends = [ROOT, ROOT]
    for step in range(400):
        ends[0] = regular.add(ends[0], step % 5)
        ends[1] = irregular.add(ends[1], random.randrange(5))
    assert regular.guess(ends[0]).probability > 0.95
    assert irregular.guess(ends[1]).probability < 0.5


def test_a_row_that_goes_back_is_followed_and_its_sibling_profits() -> None:
    drafter, first = NgramDrafter(), Text([1, 2, 3, 4, 5, 6])
    assert drafter.guess(first, 3) == []
    first.ids[3:] = [9, 1, 2]
    first.n_restarts += 1
    assert [guess.id for guess in drafter.guess(first, 2)] == [3, 4] or drafter.guess(first, 1)[0].id == 3
    second = Text([2, 3, 4])
    assert [guess.id for guess in drafter.guess(second, 2)] == [5, 6]
    fresh = NgramDrafter()
    expected = fresh.guess(Text([1, 2, 3, 9, 1, 2]), 1)
    assert expected[0].id == 3


def test_guesses_behind_guesses_are_trusted_by_how_those_fared() -> None:
    drafter, text = NgramDrafter(), Text([1, 2, 3, 4] * 30)
    guesses = drafter.guess(text, 4)
    assert [guess.id for guess in guesses] == [1, 2, 3, 4] and guesses[1].probability > 0.5
    for _ in range(5):
        drafter.learn(guesses, 1)
    assert drafter.guess(text, 4)[1].probability < 0.3 < 0.9 < drafter.guess(text, 4)[0].probability
    for _ in range(1000):
        drafter.learn(guesses, 1)
    assert len(drafter.guess(text, 4)) == 1  # hardly any text goes on so


def test_many_long_texts_are_not_added_again_for_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five texts that together are beyond what the automaton may hold: it begins anew, with the end of each."""
    monkeypatch.setattr(ngram, "MAX_STATES", 1_000)
    monkeypatch.setattr(ngram, "_KEPT_IDS", 20)
    n_added = []
    add = SuffixAutomaton.add
    monkeypatch.setattr(SuffixAutomaton, "add", lambda *arguments: n_added.append(1) or add(*arguments))
    random, drafter = Random(5), NgramDrafter()
    texts = [Text([random.randrange(50) for _ in range(300)]) for _ in range(5)]
    for _ in range(100):
        for text in texts:
            text.ids.append(random.randrange(50))
            drafter.guess(text, 3)
    assert len(drafter._automaton) <= 1_000 + 600
    assert len(n_added) < 2 * sum(len(text.ids) for text in texts)


def test_a_text_that_goes_back_behind_where_it_was_begun_anew_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_KEPT_IDS", 4)
    drafter, text = NgramDrafter(), Text([*range(10), *range(8)])
    assert drafter.guess(text, 1)[0].id == 8
    drafter.forget_texts()
    assert drafter.guess(text, 1) == []  # of 4, 5, 6, 7 alone
    text.ids[10:] = [4, 5]
    text.n_restarts += 1
    drafter.guess(text, 1)
    text.ids += [6, 7, 4, 5]
    assert drafter.guess(text, 1)[0].id == 6
