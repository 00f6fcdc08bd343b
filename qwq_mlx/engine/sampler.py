"""Logits become one id: the kept set, then one draw with a key of its own.

Nothing here reads a value back from the device, so the draw of a step is built while the step before still runs. The
key of draw i is a function of seed and i alone, so a run resumed at i, or one that runs beside others, draws the same
ids.

The default order is temperature, top-k, top-p, min-p, as transformers and vLLM do; `order="mlx-lm"` is top-p, min-p,
top-k, temperature, as mlx-lm does. Top-k comes by partition, so that top-p sorts tens of numbers, not a vocabulary.

Does not: run the model, change logits (`logits_processors` do), or refuse NaN (`decoder` does, before the id is used).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from qwq_mlx.errors import OptionError
from qwq_mlx.options import Sampling

__all__ = ["Sampler", "filtered"]

# Ids whose logit equals the k-th are kept too, as transformers does; in bfloat16 a few dozen can be equal.
_TIES = 64
_SMALLEST_TEMPERATURE = 1e-30  # below it float32 divides by zero; at it only the largest logit is left


class Sampler:
    """Draws ids by one resolved `Sampling`; it has no state but a base key.

    seed: of the random numbers. salt: another stream of the same seed.
    """

    def __init__(self, sampling: Sampling, *, seed: int, salt: int = 0) -> None:
        self.sampling = sampling
        self.salt = salt
        self._seed = seed
        # The split matters: key(seed) + i alone would give seed and seed + 1 overlapping streams.
        self._base = mx.random.split(mx.random.key(seed), 2)[0] + mx.array([salt, 0], mx.uint32)

    def other(self, sampling: Sampling, *, salt: int) -> Sampler:
        """A sampler of the same seed with other settings and its own random numbers."""
        return Sampler(sampling, seed=self._seed, salt=salt)

    def draw(self, logits: Any, index: int) -> Any:
        """One id as a scalar uint32 array, unread.

        logits: (n_ids,) float32. index: which output id this is, from 0; it selects the key.
        """
        if self.sampling.is_greedy:
            return mx.argmax(logits)
        ids, values = filtered(logits, self.sampling)
        chosen = mx.random.categorical(values, key=self._base + mx.array([0, index], mx.uint32))
        return chosen if ids is None else ids[chosen]


def filtered(logits: Any, sampling: Sampling) -> tuple[Any | None, Any]:
    """The ids that may be drawn and their tempered logits; ids that are dropped have -inf.

    logits: (n,) float32; sampling: resolved, temperature above 0. Returns ids (k,) or None for all n in order, and
    values (k,) float32 of which softmax gives the probabilities.
    Source: transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper in the order
    of its GenerationMixin; for order "mlx-lm" mlx_lm.sample_utils.make_sampler. The tests compare with both.
    """
    temperature = max(_given(sampling.temperature), _SMALLEST_TEMPERATURE)
    top_k, top_p, min_p = int(_given(sampling.top_k)), _given(sampling.top_p), _given(sampling.min_p)
    # the largest becomes 0: dividing by a tiny temperature then gives -inf, never NaN
    values = logits - logits.max()
    if sampling.order == "mlx-lm":
        ids, values = _top_p(None, values, top_p)
        ids, values = _top_k(ids, _min_p(values, min_p), top_k)
        return ids, values / temperature
    ids, values = _top_k(None, values / temperature, top_k)
    ids, values = _top_p(ids, values, top_p)
    return ids, _min_p(values, min_p)


def _top_k(ids: Any | None, values: Any, top_k: int) -> tuple[Any | None, Any]:
    if not 0 < top_k < values.size:
        return ids, values
    n_taken = min(top_k + _TIES, values.size)
    chosen = mx.argpartition(values, values.size - n_taken)[values.size - n_taken :]
    taken = values[chosen]
    order = mx.argsort(taken)
    chosen, taken = chosen[order], taken[order]
    taken = mx.where(taken < taken[n_taken - top_k], -mx.inf, taken)
    return (chosen if ids is None else ids[chosen]), taken


def _top_p(ids: Any | None, values: Any, top_p: float) -> tuple[Any | None, Any]:
    """Keep the smallest set of the likeliest that holds top_p; summed from the unlikely end, as transformers does."""
    if top_p >= 1.0:
        return ids, values
    order = mx.argsort(values)
    values = values[order]
    below = mx.cumsum(mx.softmax(values))
    is_last = mx.arange(values.size) == values.size - 1
    values = mx.where((below <= 1.0 - top_p) & ~is_last, -mx.inf, values)
    return (order if ids is None else ids[order]), values


def _min_p(values: Any, min_p: float) -> Any:
    return values if min_p <= 0.0 else mx.where(values < values.max() + math.log(min_p), -mx.inf, values)


def _given(value: float | None) -> float:
    if value is None:
        raise OptionError("The sampling still has a value of None; call resolve() first.")
    return value
