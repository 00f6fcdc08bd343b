"""How far one model's next-token distribution is from another's, from logits that come in blocks of ids.

With logits a of the reference and b of the model, KL(reference || model) = sum_i p_i (a_i - b_i) - log Za + log Zb,
where p = exp(a) / Za. Each sum is kept relative to the largest logit so far and rescaled when a larger one comes, as in
streaming softmax; so no array of positions x vocabulary exists, for neither model. Within a block float32, across
blocks float64.

Does not: run models, or average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.model.upstream import import_mlx

__all__ = ["Divergence", "Positions"]

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """One entry a measured token, in the text's order; log-probabilities and KL in nats.

    kl: KL(reference || model), never below 0. reference_logprob, logprob: of the id that the text has next.
    reference_top, top: each model's most likely id, and reference_top_p, top_p its own probability for it.
    """

    kl: Floats
    reference_logprob: Floats
    logprob: Floats
    reference_top: Ids
    top: Ids
    reference_top_p: Floats
    top_p: Floats


class _Softmax:
    """One model's distributions, gathered over blocks. next_ids: (n,), what the text has next at each position."""

    def __init__(self, next_ids: Ids) -> None:
        n = len(next_ids)
        self.largest: Floats = np.full(n, -np.inf)
        self.total: Floats = np.zeros(n)  # sum of exp(logit - largest)
        self.top: Ids = np.zeros(n, np.int64)
        self.next_logit: Floats = np.zeros(n)
        self._next_ids = next_ids

    def add(self, first_id: int, logits: Any) -> Floats:
        """Take a block (n, ids), float32; returns what sums relative to the largest logit before must be times."""
        mx = import_mlx()
        largest = mx.max(logits, axis=1)
        top = mx.argmax(logits, axis=1)
        total = mx.sum(mx.exp(logits - largest[:, None]), axis=1)
        inside = (self._next_ids >= first_id) & (self._next_ids < first_id + logits.shape[1])
        place = np.where(inside, self._next_ids - first_id, 0)
        next_logit = mx.take_along_axis(logits, mx.array(place)[:, None], axis=1)[:, 0]
        mx.eval(largest, top, total, next_logit)
        block = np.array(largest).astype(np.float64)
        new = np.maximum(self.largest, block)
        scale = np.exp(self.largest - new)
        self.top = np.where(block > self.largest, np.array(top).astype(np.int64) + first_id, self.top)
        self.total = self.total * scale + np.array(total).astype(np.float64) * np.exp(block - new)
        self.next_logit = np.where(inside, np.array(next_logit).astype(np.float64), self.next_logit)
        self.largest = new
        return scale

    @property
    def log_total(self) -> Floats:
        """log Z."""
        return np.asarray(self.largest + np.log(self.total))


class Divergence:
    """Gathers `Positions` of one window. next_ids: what the text has next at each position."""

    def __init__(self, next_ids: Sequence[int]) -> None:
        ids = np.asarray(next_ids, np.int64)
        self._reference, self._model = _Softmax(ids), _Softmax(ids)
        self._difference: Floats = np.zeros(len(ids))  # sum of exp(a - largest a) (a - b)

    def add(self, first_id: int, reference: Any, model: Any) -> None:
        """Take both models' logits for a block of ids, (positions, ids) each, in any float type."""
        mx = import_mlx()
        a, b = reference.astype(mx.float32), model.astype(mx.float32)
        largest = mx.max(a, axis=1)
        difference = mx.sum(mx.exp(a - largest[:, None]) * (a - b), axis=1)
        mx.eval(difference, largest)
        scale = self._reference.add(first_id, a)
        block = np.exp(np.array(largest).astype(np.float64) - self._reference.largest)
        self._difference = self._difference * scale + np.array(difference).astype(np.float64) * block
        self._model.add(first_id, b)

    def positions(self) -> Positions:
        """What was gathered, once every id was in a block."""
        a, b = self._reference, self._model
        return Positions(
            kl=np.maximum(0.0, self._difference / a.total - a.log_total + b.log_total),
            reference_logprob=a.next_logit - a.log_total,
            logprob=b.next_logit - b.log_total,
            reference_top=a.top,
            top=b.top,
            reference_top_p=1 / a.total,
            top_p=1 / b.total,
        )
