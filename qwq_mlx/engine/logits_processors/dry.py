"""DRY ("don't repeat yourself"): penalise tokens that would extend a repeated sequence, the longer the more.

For each place in the past, `runs` says how many ids up to there equal the latest ids. A new id y turns it into
`where(record == y, runs shifted by one + 1, 0)`: one pass over the ids so far, all on the device. The id that followed
place i is then penalised by multiplier * base ** (runs[i] - allowed length).

Does not: know texts. An id that is a breaker (its text holds a line break, a quote ...) belongs to no repeat.

Source: "DRY" by p-e-w, oobabooga/text-generation-webui pull request 5677; breakers are single ids here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.logits_processors import Incremental
from qwq_mlx.options import Sampling

__all__ = ["DryPenalty", "agreements"]

_STEP = 1024  # the record grows by this many places
_LARGEST_EXPONENT = 60.0  # e ** 60 bans an id as well as any larger number, and float32 holds it


class DryPenalty(Incremental):
    """The penalty of one `Sampling` with dry_multiplier above 0, over n_ids ids.

    Its state is the ids so far, (room,) int32 with -1 where nothing is yet, and `runs`, (room,) int32.
    """

    def __init__(self, sampling: Sampling, *, n_ids: int, breaker_ids: Iterable[int]) -> None:
        super().__init__()
        self._sampling = sampling
        self._n_ids = n_ids
        self._breakers = frozenset(breaker_ids)
        self._is_breaker = mx.array([i in self._breakers for i in range(n_ids)])
        self._start((), ())

    def _start(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        ids = [*prompt_ids, *output_ids]
        room = _STEP * (1 + len(ids) // _STEP) - len(ids)
        runs = agreements([-1 - i if token_id in self._breakers else token_id for i, token_id in enumerate(ids)])
        self._record = mx.array([*ids, *[-1] * room], mx.int32)
        self._runs = mx.array([*runs, *[0] * room], mx.int32)
        self._end = len(ids)

    def _push(self, token: Any) -> None:
        if self._end == self._record.size:
            self._record = mx.concatenate([self._record, mx.full((_STEP,), -1, mx.int32)])
            self._runs = mx.concatenate([self._runs, mx.zeros((_STEP,), mx.int32)])
        token = token.astype(mx.int32)
        shifted = mx.concatenate([mx.zeros((1,), mx.int32), self._runs[:-1]])
        self._runs = mx.where((self._record == token) & ~self._is_breaker[token], shifted + 1, 0)
        self._record = mx.where(mx.arange(self._record.size) == self._end, token, self._record)
        self._end += 1

    def _apply(self, logits: Any) -> Any:
        return logits - self._penalty()

    def _penalty(self) -> Any:
        """What to take from each logit: (n_ids,) float32."""
        sampling = self._sampling
        followed, lengths = self._record[1:], self._runs[:-1]
        places = mx.arange(1, self._record.size)
        first = self._end - sampling.dry_range if sampling.dry_range else 0
        counts = (lengths >= sampling.dry_allowed_length) & (places < self._end) & (places >= first)
        exponent = (lengths - sampling.dry_allowed_length).astype(mx.float32) * mx.log(mx.array(sampling.dry_base))
        size = sampling.dry_multiplier * mx.exp(mx.minimum(exponent, _LARGEST_EXPONENT))
        return mx.zeros(self._n_ids).at[mx.maximum(followed, 0)].maximum(mx.where(counts, size, 0.0))


def agreements(ids: Sequence[int]) -> list[int]:
    """For each place, how many ids up to and with it equal the latest ids; 0 at the last place. Linear (Z function)."""
    back = list(reversed(ids))
    lengths = [0] * len(back)
    left = right = 0
    for i in range(1, len(back)):
        length = min(right - i, lengths[i - left]) if i < right else 0
        while i + length < len(back) and back[length] == back[i + length]:
            length += 1
        lengths[i] = length
        if i + length > right:
            left, right = i, i + length
    return lengths[::-1]
