"""As many ids are drafted as give the most tokens a second by the costs, and never at the cost of plain decoding."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest

from qwq_mlx.engine.draft_length import CostsAt, PassCosts, best_lengths, costs_at
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.speculator import Speculator
from qwq_mlx.engine.drafters.suffix_automaton import Guess
from qwq_mlx.errors import OptionError

LINEAR = PassCosts(by_rows=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), sync_s=0.05)  # a CPU
M4_PRO = PassCosts(by_rows=(1.0, 0.99, 1.13, 1.43, 1.75, 2.11, 2.48, 2.84), sync_s=0.08, draft_s=0.075)
FLAT = PassCosts(by_rows=(1.0,) * 16, sync_s=0.02)
TABLES = {"linear": LINEAR, "M4 Pro": M4_PRO, "flat": FLAT}


def rate(lengths: tuple[int, ...], probabilities: list[list[float]], costs: PassCosts) -> float:
    """Expected tokens a second, worked out one row at a time."""
    n_tokens = 0.0
    for length, own in zip(lengths, probabilities, strict=True):
        reached = 1.0
        for probability in [1.0, *own[:length]]:
            reached *= probability
            n_tokens += reached
    return n_tokens / (costs.of(len(lengths) + sum(lengths)) + (costs.sync_s if any(lengths) else 0.0))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("most", [None, 3])
def test_no_other_lengths_have_a_higher_rate(name: str, most: int | None) -> None:
    random = Random(2)
    for _ in range(60):
        probabilities = [[random.random() ** 0.5 for _ in range(4)] for _ in range(random.randrange(1, 4))]
        found = best_lengths(probabilities, TABLES[name], most=most)
        every = product(range(5), repeat=len(probabilities))
        best = max(rate(each, probabilities, TABLES[name]) for each in every if most is None or sum(each) <= most)
        assert rate(tuple(found.by_row), probabilities, TABLES[name]) == pytest.approx(best)
        assert found.rate == pytest.approx(best)


def test_where_rows_cost_what_they_cost_alone_nothing_is_drafted_and_where_they_are_free_all_is() -> None:
    certain = [[1.0] * 6]
    assert best_lengths(certain, LINEAR).by_row == [0]
    assert best_lengths(certain, FLAT).by_row == [6]
    assert best_lengths([[0.6] * 6], M4_PRO).by_row == [2]
    assert best_lengths([[0.6] * 6], M4_PRO, are_to_draft=True).by_row == [2]
    dear = PassCosts(by_rows=M4_PRO.by_rows, sync_s=0.08, draft_s=0.9)
    assert best_lengths([[0.6] * 6], dear, are_to_draft=True).by_row == [0]


def test_in_a_batch_rows_go_where_they_are_most_probably_right() -> None:
    costs = PassCosts(by_rows=(1.0, 1.0, 1.0, 1.1, 1.2, 5.0), sync_s=0.0)
    assert best_lengths([[0.1], [0.9, 0.8], [0.05]], costs).by_row == [0, 2, 0]


@pytest.mark.parametrize("values", [{"by_rows": ()}, {"by_rows": (0.0,)}, {"by_rows": (1.0,), "sync_s": float("nan")}])
def test_costs_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected seconds of at least one pass"):
        PassCosts(**({"sync_s": 0.0} | values))


class Row:
    """A row of which only the ids are there."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.n_restarts = 0
        self.most_drafts = 100


class Liar(NgramDrafter):
    """Sure of ids that never come."""

    def guess(self, row: Any, n_most: int) -> list[Guess]:
        return [Guess(-1, 0.95, 30)] * n_most

    def learn(self, guesses: list[Guess], n_right: int) -> None:
        pass


class SureModel(ModelDrafter):
    """A draft model that knows the texts, or names an id that never comes."""

    def __init__(self, texts: dict[int, list[int]], *, is_right: bool) -> None:
        super().__init__(None, n_ids=1, chunk=1, context=1)
        self._known, self._is_right = texts, is_right

    def guess(self, rows: Any, n_each: Any) -> list[list[Guess]]:
        return [
            [Guess(each if self._is_right else -1, 0.9, 9) for each in self._known[row.ids[0]][len(row.ids) :][:n]]
            for row, n in zip(rows, n_each, strict=True)
        ]


def texts(number: int = 0) -> dict[int, list[int]]:
    """A mixed set: over and over the same, random, and words of a few; each begins with its name."""
    random = Random(4 + number)
    words = [[random.randrange(50) for _ in range(random.randrange(2, 7))] for _ in range(30)]
    written = [token_id for _ in range(120) for token_id in random.choice(words)]
    set_of = [
        [1, 2, 3, 4, 5, 6] * 60,
        [random.randrange(10_000) for _ in range(300)],
        written,
        [random.randrange(4) for _ in range(200)],
    ]
    return {name: [name, *text] for name, text in enumerate(set_of, start=1000 + 4 * number)}


class LaggingModel(SureModel):
    """Reads what it has not seen before it drafts, 0.1 s an id. clock: seconds, which that and drafts move."""

    def __init__(self, texts: dict[int, list[int]], costs: PassCosts, *, is_right: bool) -> None:
        super().__init__(texts, is_right=is_right)
        self._costs, self._n_seen, self.clock, self.caught_up_s = costs, dict[int, int](), 0.0, 0.0

    def lags(self, row: Any) -> bool:
        return len(row.ids) - self._n_seen.get(row.ids[0], 0) > 8

    def guess(self, rows: Any, n_each: Any) -> list[list[Guess]]:
        for row, n in zip(rows, n_each, strict=True):
            if n:
                read_s = 0.1 * max(0, len(row.ids) - self._n_seen.get(row.ids[0], 0) - 8)
                self._n_seen[row.ids[0]] = len(row.ids)
                self.caught_up_s += read_s
                self.clock += read_s + n * self._costs.draft_s
        return super().guess(rows, n_each)


def decoded_s(speculator: Speculator, text: list[int], costs: PassCosts) -> float:
    """Seconds by the table that a text takes in the decoder's loop: pipelined, or read first where drafts are due."""
    row: Any = Row(text[:1])
    seconds, is_read = 0.0, True
    while len(row.ids) < len(text):
        draft = speculator.draft([row], most=None)[0] if is_read else None
        n_right = 0
        if draft is not None and draft.ids:
            following = text[len(row.ids) :][: len(draft.ids)]
            pairs = zip(draft.ids, following, strict=False)
            n_right = next((n for n, (one, other) in enumerate(pairs) if one != other), len(following))
            speculator.learn(row, draft, n_right)
            seconds += costs.draft_s * len(draft.ids) * (draft.source == "model")
        seconds += costs.of(1 + len(draft.ids if draft is not None else ())) + costs.sync_s * is_read
        is_due = bool(draft is not None and draft.ids) or speculator.is_due([row])
        row.ids += text[len(row.ids) : len(row.ids) + 1 + n_right]
        is_read = is_due
    return seconds


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("drafter", ["ngram", "liar", "right model", "wrong model"])
def test_no_text_takes_longer_than_1_02_of_plain_decoding(name: str, drafter: str) -> None:
    costs, known = TABLES[name], texts()
    ngram = {"ngram": NgramDrafter, "liar": Liar}.get(drafter)
    model = SureModel(known, is_right=drafter == "right model") if ngram is None else None
    speculator = Speculator(ngram=None if ngram is None else ngram(), model=model, costs=costs)
    speeds = {}
    for each, text in known.items():
        plain_s = costs.of(1) * (len(text) - 1)
        speeds[each] = plain_s / decoded_s(speculator, text, costs)
    assert min(speeds.values()) > 0.98, speeds
    if name == "linear":
        assert speculator.counts.drafted == {}  # on a CPU nothing can pay
    elif drafter == "ngram":
        assert speeds[1000] > 1.5
    elif drafter == "right model":
        assert min(speeds.values()) > 1.3


@pytest.mark.parametrize("is_right", [False, True])
def test_a_draft_model_that_has_to_catch_up_does_so_as_often_as_that_pays(is_right: bool) -> None:
    """Of a right one the time is that of one reading, of a wrong one below 2 % of all texts' and one reading."""
    costs = TABLES["flat"]
    known = {each: text for number in range(5) for each, text in texts(number).items()}
    model = LaggingModel(known, costs, is_right=is_right)
    speculator = Speculator(model=model, costs=costs, clock=lambda: model.clock)
    plain_s = costs.of(1) * sum(len(text) - 1 for text in known.values())
    seconds = sum(decoded_s(speculator, text, costs) for text in known.values()) + model.caught_up_s
    if is_right:
        assert seconds < plain_s / 1.3
    else:
        assert model.caught_up_s > 0
        assert seconds < plain_s / 0.98 + 0.1 * max(map(len, known.values()))


def test_what_is_no_speculator_is_refused() -> None:
    for values, text in (
        ({"costs": FLAT}, "There is no drafter"),
        ({"ngram": NgramDrafter()}, "either the costs of passes, or a length"),
        ({"ngram": NgramDrafter(), "costs": FLAT, "length": 2}, "either the costs of passes, or a length"),
        ({"ngram": NgramDrafter(), "length": 16}, "length is 16, expected from 1 to 15"),
    ):
        with pytest.raises(OptionError, match=text):
            Speculator(**values)


def test_costs_between_and_beyond_two_contexts_lie_on_a_line() -> None:
    short, long = PassCosts(by_rows=(1.0, 1.2, 1.4), sync_s=0.1), PassCosts(by_rows=(2.0, 3.2), sync_s=0.3, draft_s=0.5)
    costs = costs_at([CostsAt(context=4_352, costs=long), CostsAt(context=256, costs=short)])
    assert costs.at(0) == costs.at(256) == short
    assert costs.at(2_304 + 255).by_rows == pytest.approx((1.5, 2.2, 2.9))  # half way, by steps of 256
    assert costs.at(8_448).by_rows == pytest.approx((3.0, 5.2, 7.4)) and costs.at(8_448).sync_s == 0.1
    falling = costs_at([CostsAt(context=256, costs=long), CostsAt(context=512, costs=short)])
    assert falling.at(5_000).by_rows[:2] == long.by_rows, "noise; a longer context is never cheaper"
    assert costs_at([CostsAt(context=256, costs=short)]).at(9_999) is short
