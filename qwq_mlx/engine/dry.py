"""DRY: make it dear to go on with a repeat, the dearer the longer it is, without reading an id back from the device.

For each place in the past, `runs` says how many ids up to there equal the latest ids. A new id y turns it into
`where(record == y, runs shifted by one + 1, 0)`: one pass over the ids so far, all on the device. The id that followed
place i is then taxed by multiplier * base ** (runs[i] - allowed length).

Does not: know texts. An id that is a breaker (its text holds a line break, a quote ...) belongs to no repeat.

Source: "DRY" by p-e-w, oobabooga/text-generation-webui pull request 5677; breakers are single ids here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.options import Sampling

__all__ = ["Dry", "Past", "agreements"]

_STEP = 1024  # the record grows by this many places
_LARGEST_EXPONENT = 60.0  # e ** 60 bans an id as well as any larger number, and float32 holds it


class Past(NamedTuple):
    """The ids so far. record: (n,) int32, -1 where nothing is yet; runs: (n,) int32; end: how many places are taken."""

    record: Any
    runs: Any
    end: int


class Dry:
    """The penalty of one `Sampling` with dry_multiplier above 0, over n_ids ids."""

    def __init__(self, sampling: Sampling, *, n_ids: int, breaker_ids: Iterable[int]) -> None:
        self._sampling = sampling
        self._n_ids = n_ids
        self._breakers = frozenset(breaker_ids)
        self._is_breaker = mx.array([i in self._breakers for i in range(n_ids)])

    def start(self, ids: Sequence[int]) -> Past:
        """The state after these ids, worked out on the host."""
        room = _STEP * (1 + len(ids) // _STEP) - len(ids)
        runs = agreements([-1 - i if token_id in self._breakers else token_id for i, token_id in enumerate(ids)])
        return Past(mx.array([*ids, *[-1] * room], mx.int32), mx.array([*runs, *[0] * room], mx.int32), len(ids))

    def push(self, past: Past, token_id: Any) -> Past:
        """The state once this id (scalar array, perhaps unread) came."""
        record, runs, end = past
        if end == record.size:
            record = mx.concatenate([record, mx.full((_STEP,), -1, mx.int32)])
            runs = mx.concatenate([runs, mx.zeros((_STEP,), mx.int32)])
        token_id = token_id.astype(mx.int32)
        shifted = mx.concatenate([mx.zeros((1,), mx.int32), runs[:-1]])
        runs = mx.where((record == token_id) & ~self._is_breaker[token_id], shifted + 1, 0)
        return Past(mx.where(mx.arange(record.size) == end, token_id, record), runs, end + 1)

    def penalty(self, past: Past) -> Any:
        """What to take from each logit: (n_ids,) float32."""
        sampling = self._sampling
        followed, lengths = past.record[1:], past.runs[:-1]
        places = mx.arange(1, past.record.size)
        first = past.end - sampling.dry_range if sampling.dry_range else 0
        counts = (lengths >= sampling.dry_allowed_length) & (places < past.end) & (places >= first)
        exponent = (lengths - sampling.dry_allowed_length).astype(mx.float32) * mx.log(mx.array(sampling.dry_base))
        size = sampling.dry_multiplier * mx.exp(mx.minimum(exponent, _LARGEST_EXPONENT))
        return mx.zeros(self._n_ids).at[mx.maximum(followed, 0)].maximum(mx.where(counts, size, 0.0))


def agreements(ids: Sequence[int]) -> list[int]:
    """For each place, how many ids up to and with it equal the latest ids; 0 at the last place. Linear (Z function)."""
    back = list(reversed(ids))
    found = [0] * len(back)
    left = right = 0
    for i in range(1, len(back)):
        length = min(right - i, found[i - left]) if i < right else 0
        while i + length < len(back) and back[length] == back[i + length]:
            length += 1
        found[i] = length
        if i + length > right:
            left, right = i, i + length
    return found[::-1]
