"""Logits become one id: the kept set, then the largest of log-probability plus Gumbel noise.

The noise of an id is a function of seed, index and that id alone (a counter-based generator), not of its place in a
sorted list or of what else is kept. So a seed gives the same ids alone, beside other rows, resumed and forked, and two
models that agree on the likely ids draw the same one (Daliri, Musco and Suresh, "Coupling without Communication and
Drafter-Invariant Speculative Decoding").

Nothing here reads a value back from the device, so the draw of a step is built while the step before still runs.

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

__all__ = ["Sampler", "filtered", "gumbel"]

# Ids whose logit equals the k-th are kept too, as transformers does; in bfloat16 a few dozen can be equal.
_TIES = 64
_SMALLEST_TEMPERATURE = 1e-30  # below it float32 divides by zero; at it only the largest logit is left
_SMALLEST_UNIFORM = 1e-10  # about 2**-33, half the step of 32 random bits: a 0 would be infinite noise


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
        step_key = mx.random.split(self._base + mx.array([0, index], mx.uint32), 1)[0]
        chosen = mx.argmax(values + gumbel(step_key, mx.arange(values.size) if ids is None else ids))
        return chosen if ids is None else ids[chosen]


def gumbel(key: Any, ids: Any) -> Any:
    """Standard Gumbel noise of each id, (k,) float32: the same number for an id whatever the others are.

    key: (2,) uint32 of the step. ids: (k,) integers.
    The number comes from the small end of the uniform one, where float32 has the digits that the largest noise needs.

    >>> import mlx.core as mx
    >>> key = mx.random.key(7)
    >>> gumbel(key, mx.array([3, 9]))[1].item() == gumbel(key, mx.array([9]))[0].item()
    True
    """
    keys = mx.stack([mx.broadcast_to(key[0], ids.shape), key[1] + ids.astype(mx.uint32)], axis=-1)
    uniform = mx.vmap(_uniform)(keys)
    return -mx.log(-mx.log1p(-mx.maximum(uniform, _SMALLEST_UNIFORM)))


def _uniform(key: Any) -> Any:
    return mx.random.uniform(key=key)


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
