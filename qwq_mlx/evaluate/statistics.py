"""What can be said from counts of right answers: intervals, pass@k, maj@k, and tests of two models on one task.

Plain Python and numpy; each is a few lines, and the tests compare it with scipy and with counting every subset.

Sources: Wilson 1927 (the interval); Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640; clusters, pairs);
Chen et al. 2021 (arXiv 2107.03374; pass@k without bias); Wang et al. 2022 (arXiv 2203.11171; majority votes).

Does not: know what a problem or a model is.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Interval",
    "accuracy_interval",
    "bootstrap_difference",
    "detectable_difference",
    "majority_at_k",
    "mcnemar_p",
    "pass_at_k",
    "wilson_interval",
]

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""
_Z80 = 0.8416212335729143  # of a power of 80 %
_MIN_DISCORDANT = 6  # the fewest pairs that exact McNemar can find significant: 2 * 0.5**6 = 0.031
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval of a share, from low to high."""

    low: float
    high: float


def wilson_interval(n_right: int, n: int) -> Interval:
    """Wilson's interval of n_right of n.

    >>> interval = wilson_interval(453, 500)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.877, 0.929)
    """
    share, z2 = n_right / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def accuracy_interval(n_right: Sequence[int], n_samples: int) -> Interval:
    """Of the share of right samples. n_right: of each problem's n_samples.

    One sample: Wilson's. Several are no independent draws, so problems are the clusters: the mean of the problems'
    shares and their standard error. Where all problems have one share, that error is 0 and says nothing; then Wilson's
    of as many samples as there are problems.
    """
    n = len(n_right)
    if n_samples == 1:
        return wilson_interval(sum(n_right), n)
    if len(set(n_right)) == 1:
        return wilson_interval(round(n_right[0] / n_samples * n), n)
    shares = np.array(n_right) / n_samples
    mean, error = float(shares.mean()), float(shares.std(ddof=1)) / math.sqrt(n)
    return Interval(max(0.0, mean - Z95 * error), min(1.0, mean + Z95 * error))


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The share of subsets of k of n samples that hold a right one.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


@functools.lru_cache(maxsize=4096)
def majority_at_k(groups: tuple[tuple[int, bool], ...], n: int, k: int) -> float:
    """The share of subsets of k of n samples whose most frequent answer is right.

    groups: (samples, is right) of each answer; samples without an answer are in none. Of equally frequent answers each
    counts its part, which is the mean over all orders of a vote that takes the earliest. Exact: subsets are counted by
    how many of them have so many samples, so frequent a first answer, so many of that frequency, so many right.

    >>> majority_at_k(((2, True), (1, False)), 3, 1), majority_at_k(((2, True), (1, False)), 3, 3)
    (0.6666666666666666, 1.0)
    """
    states: Counter[tuple[int, int, int, int]] = Counter({(0, 0, 0, 0): 1})
    for size, is_right in groups:
        following: Counter[tuple[int, int, int, int]] = Counter()
        for (n_drawn, top, n_tied, n_tied_right), ways in states.items():
            for n_votes in range(min(size, k - n_drawn) + 1):
                if n_votes > top:
                    leaders = (n_votes, 1, int(is_right))
                elif n_votes == top and top:
                    leaders = (top, n_tied + 1, n_tied_right + int(is_right))
                else:
                    leaders = (top, n_tied, n_tied_right)
                following[n_drawn + n_votes, leaders[0], leaders[1], leaders[2]] += ways * math.comb(size, n_votes)
        states = following
    n_silent = n - sum(size for size, _ in groups)
    total: float = sum(
        ways * math.comb(n_silent, k - n_drawn) * n_tied_right / n_tied
        for (n_drawn, _, n_tied, n_tied_right), ways in states.items()
        if n_tied
    )
    return total / math.comb(n, k)


def mcnemar_p(n_only_first: int, n_only_second: int) -> float:
    """The exact two-sided p of McNemar's test: how likely a split at least so uneven is where neither is better.

    n_only_first: problems that the first alone solves. n_only_second: those that the second alone solves.

    >>> round(mcnemar_p(15, 5), 3), round(mcnemar_p(20, 10), 3)
    (0.041, 0.099)
    """
    n, fewer = n_only_first + n_only_second, min(n_only_first, n_only_second)
    tail: int = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n))


def bootstrap_difference(differences: Sequence[float], *, seed: int = 0) -> tuple[Interval, float]:
    """The 95 % percentile interval of the mean difference, problems drawn with replacement, and the two-sided p.

    differences: of the two shares of right samples, of each problem. p: twice the share of means at or beyond 0, at
    least 2 / (resamples + 1).
    """
    means = _bootstrap_means(np.asarray(differences, np.float64), seed)
    low, high = np.percentile(means, [2.5, 97.5])
    n_beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Interval(float(low), float(high)), min(1.0, 2 * (n_beyond + 1) / (len(means) + 1))


def _bootstrap_means(differences: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of RESAMPLES draws of as many problems, a few hundred draws at a time."""
    generator, n = np.random.default_rng(seed), len(differences)
    parts = []
    for start in range(0, RESAMPLES, 500):
        places = generator.integers(0, n, (min(500, RESAMPLES - start), n))
        parts.append(differences[places].mean(axis=1))
    return np.concatenate(parts)


def detectable_difference(differences: Sequence[float]) -> float:
    """The smallest true difference that so many problems, as varied as these, show in 4 of 5 repetitions (p < 0.05).

    By the standard error of the mean difference; at least what six problems that one model alone solves come to, for
    with fewer no exact test is significant.
    """
    n = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return min(1.0, max((Z95 + _Z80) * error, _MIN_DISCORDANT / n))
