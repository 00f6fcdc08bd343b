"""Statistics of evaluations equal scipy's, and what counting every subset gives, on random tables."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from qwq_mlx.evaluate import statistics
from qwq_mlx.evaluate.statistics import (
    Z95,
    accuracy_interval,
    bootstrap_difference,
    detectable_difference,
    majority_at_k,
    mcnemar_p,
    pass_at_k,
    wilson_interval,
)


def test_wilson_and_mcnemar_equal_scipys_on_a_thousand_random_tables() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    rng = random.Random(19)
    for _ in range(1000):
        n = rng.randint(1, 2000)
        n_right = rng.choice((0, n, rng.randint(0, n)))
        expected = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
        interval = wilson_interval(n_right, n)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        first, second = rng.randint(0, 80), rng.randint(0, 80)
        expected_p = binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar_p(first, second) == pytest.approx(expected_p, abs=1e-12)


def test_clustered_intervals_equal_scipys_standard_error_on_a_thousand_random_tables() -> None:
    sem = pytest.importorskip("scipy.stats").sem
    rng = random.Random(20)
    for _ in range(1000):
        n_samples = rng.randint(2, 9)
        n_right = [rng.randint(0, n_samples) for _ in range(rng.randint(2, 60))]
        interval, shares = accuracy_interval(n_right, n_samples), np.array(n_right) / n_samples
        if len(set(n_right)) > 1:
            half = Z95 * sem(shares)
            expected = max(0.0, shares.mean() - half), min(1.0, shares.mean() + half)
            assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_where_all_problems_agree_the_interval_is_that_of_one_sample_each() -> None:
    assert accuracy_interval([4] * 30, 4) == wilson_interval(30, 30) == accuracy_interval([1] * 30, 1)


def test_the_bootstrap_equals_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(21)
    for _ in range(100):
        values = rng.integers(-2, 3, int(rng.integers(3, 60))) / 2
        if len(set(values)) > 1:
            theirs = bootstrap((values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(0))
            ours, p = bootstrap_difference(values.tolist())
            expected = theirs.confidence_interval
            assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
            beyond = min((theirs.bootstrap_distribution <= 0).sum(), (theirs.bootstrap_distribution >= 0).sum())
            assert p == pytest.approx(min(1.0, 2 * (beyond + 1) / 501))


def test_pass_and_majority_at_k_equal_counting_every_subset() -> None:
    rng = random.Random(22)
    for _ in range(60):
        n = rng.randint(1, 9)
        answers = [rng.choice("RRabc-") for _ in range(n)]  # R is right, - is no answer
        if rng.random() < 0.3:
            answers = [rng.choice("RQab-") for _ in range(n)]
        right = {"R", "Q"}  # two right answers of a Game of 24
        groups = tuple((count, answer in right) for answer, count in Counter(answers).items() if answer != "-")
        n_right = sum(answer in right for answer in answers)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(n, n_right, k) == pytest.approx(
                sum(not right.isdisjoint(subset) for subset in subsets) / len(subsets)
            )
            assert majority_at_k(groups, n, k) == pytest.approx(sum(map(_vote, subsets)) / len(subsets))


def _vote(subset: tuple[str, ...]) -> float:
    """The share of right ones among the most frequent answers."""
    counts = Counter(answer for answer in subset if answer != "-")
    leaders = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(answer in "RQ" for answer in leaders) / len(leaders) if leaders else 0.0


def test_the_majority_of_64_samples_is_counted_without_enumerating_subsets() -> None:
    groups = ((30, True), (20, False), *(((1, False),) * 10))
    assert majority_at_k(groups, 64, 1) == pytest.approx(30 / 64)
    assert majority_at_k(groups, 64, 64) == 1.0
    assert 0.5 < majority_at_k(groups, 64, 16) < 1.0


def test_the_detectable_difference_shows_in_four_of_five_repetitions() -> None:
    """Of tables drawn with just that difference, about 80 % are significant; fewer than six pairs never are."""
    rng = np.random.default_rng(23)
    n, n_significant = 300, 0
    differences = np.array([-1] * 30 + [1] * 30 + [0] * 240)
    smallest = detectable_difference(differences.tolist())
    shift = smallest / 2
    for _ in range(300):
        draws = rng.random(n)
        first, second = (draws < 0.1 - shift).sum(), (draws > 0.9 - shift).sum()
        n_significant += mcnemar_p(int(first), int(second)) < 0.05
    assert 0.65 < n_significant / 300 < 0.9  # exact McNemar is careful, so it shows a little less
    assert detectable_difference([0.0] * 100) == 0.06 and mcnemar_p(0, 5) > 0.05 > mcnemar_p(0, 6)
    assert detectable_difference([0.0]) == 1.0 and math.isfinite(detectable_difference([1.0, 0.0]))
