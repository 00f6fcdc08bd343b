"""Votes over the samples of one problem: who says the same, and what ending a vote early saves.

Does not: draw samples (`generate.vote` does, and decides by the same rule).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qwq_mlx.evaluate.judge import is_same_answer
from qwq_mlx.evaluate.rows import Row
from qwq_mlx.evaluate.task import Problem
from qwq_mlx.generate.vote import VoteGroup, decided

__all__ = ["tokens_until_decided", "vote_sizes", "votes_of"]


def votes_of(problem: Problem, rows: Sequence[Row]) -> list[str | None]:
    """What each sample votes for: the first spelling of its answer; None for a sample without one."""
    is_same, votes = is_same_answer(problem), list[str | None]()
    spellings: list[str] = []
    for row in rows:
        vote = (
            None if row.answer is None else next((each for each in spellings if is_same(each, row.answer)), row.answer)
        )
        if vote is not None and vote not in spellings:
            spellings.append(vote)
        votes.append(vote)
    return votes


def vote_sizes(votes: Sequence[str | None], rows: Sequence[Row]) -> tuple[tuple[int, bool], ...]:
    """How many samples gave each answer, and whether it is right (the verdict of most of them), ascending."""
    sizes = Counter(vote for vote in votes if vote is not None)
    n_right = Counter(vote for vote, row in zip(votes, rows, strict=True) if row.is_right)
    return tuple(sorted((size, 2 * n_right[vote] > size) for vote, size in sizes.items()))


def tokens_until_decided(votes: Sequence[str | None], n_tokens: Sequence[int]) -> int:
    """Tokens of the samples, drawn one after another, until those to come cannot change the first answer.

    >>> tokens_until_decided(["7", "7", "7", "8"], [10, 10, 10, 10])
    30
    """
    for n in range(1, len(votes)):
        sizes = Counter(vote for vote in votes[:n] if vote is not None)
        groups = [VoteGroup(answer=vote, samples=tuple(range(size))) for vote, size in sizes.most_common()]
        if decided(groups, len(votes) - n, stop_early=True, confidence=None):
            return sum(n_tokens[:n])
    return sum(n_tokens)
