"""Logits become ids, one a row: the kept set, then the largest of log-probability plus Gumbel noise.

The noise of an id is a function of seed, index and that id alone (a counter-based generator), not of its place in a
sorted list or of what else is kept. So a seed gives the same ids alone, beside other rows, resumed and forked, and two
models that agree on the likely ids draw the same one (Daliri, Musco and Suresh, "Coupling without Communication and
Drafter-Invariant Speculative Decoding").

Nothing here reads a value back from the device, so the draw of a step is built while the step before still runs. Rows
whose samplings are of one kind are drawn by one set of operations, whatever their temperatures and seeds: on a GPU the
launches of a draw for each row would cost more than the pass over the weights. On the CPU a row gets the bits that it
gets alone.

The default order is temperature, top-k, top-p, min-p, as transformers and vLLM do; `order="mlx-lm"` is top-p, min-p,
top-k, temperature, as mlx-lm does. Top-k comes by partition, so that top-p sorts tens of numbers, not a vocabulary.

Does not: run the model, change logits (`logits_processors` do), or refuse NaN (`decoder` does, before the id is used).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.errors import OptionError
from qwq_mlx.options import Sampling

__all__ = ["Sampler", "compiled_on_cpu", "draw_rows", "filtered", "gumbel"]

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

    @property
    def base_key(self) -> Any:
        """(2,) uint32: every step's key is made of it and the step's index."""
        return self._base

    def draw(self, logits: Any, index: int) -> Any:
        """One id as a scalar uint32 array, unread.

        logits: (n_ids,) float32. index: which output id this is, from 0; it selects the key.
        """
        return draw_rows([self], logits[None], [index])[0]


def draw_rows(samplers: Sequence[Sampler], logits: Any, indices: Sequence[int]) -> Any:
    """An id of each row, (rows,) uint32, unread.

    logits: (rows, n_ids) float32. indices: which output id it is in its row, from 0.
    """
    by_kind: dict[_Kind, list[int]] = {}
    for row, sampler in enumerate(samplers):
        by_kind.setdefault(_kind(sampler.sampling), []).append(row)
    if len(by_kind) == 1:
        [kind] = by_kind
        return _draw_alike(kind, tuple(samplers), logits, indices)
    drawn = [
        _draw_alike(kind, tuple(samplers[row] for row in rows), logits[mx.array(rows)], [indices[row] for row in rows])
        for kind, rows in by_kind.items()
    ]
    order = [row for rows in by_kind.values() for row in rows]
    return mx.concatenate(drawn)[mx.array(sorted(range(len(order)), key=order.__getitem__))]


class _Kind(NamedTuple):
    """What decides the operations of a draw; order is "" for greedy ones."""

    order: str
    top_k: int
    has_top_p: bool
    has_min_p: bool


@dataclass(frozen=True, slots=True)
class _Values:
    """What differs among rows of one kind, (rows, 1) float32 each: 1 - top_p, and the logarithm of min_p."""

    temperature: Any
    below_top_p: Any
    log_min_p: Any


def _kind(sampling: Sampling) -> _Kind:
    if sampling.is_greedy:
        return _Kind("", 0, False, False)
    top_p, min_p = _given(sampling.top_p), _given(sampling.min_p)
    return _Kind(sampling.order, int(_given(sampling.top_k)), top_p < 1.0, min_p > 0.0)


def _values(samplings: Sequence[Sampling]) -> _Values:
    def column(numbers: list[float]) -> Any:
        return mx.array(numbers, mx.float32).reshape(-1, 1)

    return _Values(
        column([max(_given(each.temperature), _SMALLEST_TEMPERATURE) for each in samplings]),
        column([1.0 - _given(each.top_p) for each in samplings]),
        column([math.log(min_p) if (min_p := _given(each.min_p)) > 0.0 else 0.0 for each in samplings]),
    )


@functools.lru_cache(maxsize=16)
def _on_device(samplers: tuple[Sampler, ...]) -> tuple[_Values, Any]:
    """The values of some rows and their base keys, (rows, 2); a loop asks for the same ones at each step."""
    return _values([each.sampling for each in samplers]), mx.stack([each.base_key for each in samplers])


def _draw_alike(kind: _Kind, samplers: tuple[Sampler, ...], logits: Any, indices: Sequence[int]) -> Any:
    """`draw_rows` of rows of one kind."""
    if not kind.order:
        return mx.argmax(logits, axis=-1)
    values_by_row, bases = _on_device(samplers)
    ids, values = _filtered(logits, kind, values_by_row)
    noise = _noise(bases, mx.array(list(indices), mx.uint32), mx.arange(values.shape[-1]) if ids is None else ids)
    chosen = mx.argmax(values + noise, axis=-1)
    return chosen if ids is None else _taken(ids, chosen[:, None])[:, 0]


def _split_once(key: Any) -> Any:
    return mx.random.split(key, 1)[0]


_first_split: Any = mx.vmap(_split_once)


def gumbel(keys: Any, ids: Any) -> Any:
    """Standard Gumbel noise of each id, float32: the same number for an id whatever the others are.

    keys: (2,) uint32 of a step and ids: (k,) integers, for (k,); or (rows, 2) and ids (k,) or (rows, k), for (rows, k).
    The number comes from the small end of the uniform one, where float32 has the digits that the largest noise needs.

    >>> import mlx.core as mx
    >>> key = mx.random.key(7)
    >>> gumbel(key, mx.array([3, 9]))[1].item() == gumbel(key, mx.array([9]))[0].item()
    True
    """
    second = keys[..., 1:] + ids.astype(mx.uint32)
    pairs = mx.stack([mx.broadcast_to(keys[..., :1], second.shape), second], axis=-1)
    uniform = _uniforms(pairs.reshape(-1, 2)).reshape(second.shape)
    return -mx.log(-mx.log1p(-mx.maximum(uniform, _SMALLEST_UNIFORM)))


def compiled_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one compiled graph on the CPU, where its small operations cost as much as a layer.

    The bits are the same, but for fused multiply-adds where the compiler makes them. On a GPU it runs as it is.
    """
    compiled: Callable[..., Any] = mx.compile(function)

    @functools.wraps(function)
    def run(*arrays: Any) -> Any:
        return (compiled if mx.default_device().type == mx.cpu else function)(*arrays)

    return run


@compiled_on_cpu
def _noise(bases: Any, indices: Any, ids: Any) -> Any:
    """Noise of each row, (rows, k). bases: (rows, 2) base keys. indices: (rows,) uint32. ids: (k,) or (rows, k)."""
    keys = _first_split(bases + mx.stack([mx.zeros_like(indices), indices], axis=-1))
    return gumbel(keys, ids)


def _uniform(key: Any) -> Any:
    return mx.random.uniform(key=key)


_uniforms: Any = mx.vmap(_uniform)


def filtered(logits: Any, sampling: Sampling) -> tuple[Any | None, Any]:
    """The ids that may be drawn and their tempered logits; ids that are dropped have -inf.

    logits: (n,) float32; sampling: resolved, temperature above 0. Returns ids (k,) or None for all n in order, and
    values (k,) float32 of which softmax gives the probabilities.
    Source: transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper in the order
    of its GenerationMixin; for order "mlx-lm" mlx_lm.sample_utils.make_sampler. The tests compare with both.
    """
    ids, values = _filtered(logits[None], _kind(sampling), _values([sampling]))
    return None if ids is None else ids[0], values[0]


def _filtered(logits: Any, kind: _Kind, by_row: _Values) -> tuple[Any | None, Any]:
    """`filtered` of rows of one kind: ids None or (rows, k), values (rows, k)."""
    # the largest becomes 0: dividing by a tiny temperature then gives -inf, never NaN
    values = logits - logits.max(axis=-1, keepdims=True)
    if kind.order == "mlx-lm":
        ids, values = _top_p(None, values, kind, by_row)
        ids, values = _top_k(ids, _min_p(values, kind, by_row), kind.top_k)
        return ids, values / by_row.temperature
    ids, values = _top_k(None, values / by_row.temperature, kind.top_k)
    ids, values = _top_p(ids, values, kind, by_row)
    return ids, _min_p(values, kind, by_row)


def _taken(values: Any, places: Any) -> Any:
    """Of each row, (rows, k), what stands at its places."""
    return mx.take_along_axis(values, places, axis=-1)


def _top_k(ids: Any | None, values: Any, top_k: int) -> tuple[Any | None, Any]:
    size = values.shape[-1]
    if not 0 < top_k < size:
        return ids, values
    n_taken = min(top_k + _TIES, size)
    chosen = mx.argpartition(values, size - n_taken, axis=-1)[:, size - n_taken :]
    taken = _taken(values, chosen)
    order = mx.argsort(taken, axis=-1)
    chosen, taken = _taken(chosen, order), _taken(taken, order)
    taken = mx.where(taken < taken[:, n_taken - top_k, None], -mx.inf, taken)
    return (chosen if ids is None else _taken(ids, chosen)), taken


def _top_p(ids: Any | None, values: Any, kind: _Kind, by_row: _Values) -> tuple[Any | None, Any]:
    """Keep the smallest set of the likeliest that holds top_p; summed from the unlikely end, as transformers does."""
    if not kind.has_top_p:
        return ids, values
    if ids is None:  # else `_top_k` has sorted them
        ids = mx.argsort(values, axis=-1)
        values = _taken(values, ids)
    below = mx.cumsum(mx.softmax(values, axis=-1), axis=-1)
    return ids, mx.where((below <= by_row.below_top_p) & _all_but_the_last(values.shape[-1]), -mx.inf, values)


@functools.lru_cache(maxsize=16)
def _all_but_the_last(size: int) -> Any:
    """(size,) bool; made once, for it costs as much as any other operation of a step."""
    mask = mx.arange(size) < size - 1
    mx.eval(mask)
    return mask


def _min_p(values: Any, kind: _Kind, by_row: _Values) -> Any:
    if not kind.has_min_p:
        return values
    return mx.where(values < values.max(axis=-1, keepdims=True) + by_row.log_min_p, -mx.inf, values)


def _given(value: float | None) -> float:
    if value is None:
        raise OptionError("The sampling still has a value of None; call resolve() first.")
    return value
