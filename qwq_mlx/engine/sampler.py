"""Logits become one id: penalties, then the kept set, then one draw with a key of its own.

Nothing here reads a value back from the device, so the draw of a step is built while the step before still runs: what
penalties and the language guard remember are arrays that the drawn (still unread) id is put into. The key of draw i is
a function of seed and i alone, so a run resumed at i, or one that runs beside others, draws the same ids.

The default order is temperature, top-k, top-p, min-p, as transformers and vLLM do; `order="mlx-lm"` is top-p, min-p,
top-k, temperature, as mlx-lm does. Top-k comes by partition, so that top-p sorts tens of numbers, not a vocabulary.

Does not: run the model, know texts, or refuse NaN (`decode` does, before the id is used).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.engine.dry import Dry, Past
from qwq_mlx.engine.language_mask import LanguageGuard
from qwq_mlx.errors import OptionError
from qwq_mlx.options import Sampling

__all__ = ["Memory", "Sampler", "kept"]

# Ids whose logit equals the k-th are kept too, as transformers does; in bfloat16 a few dozen can be equal.
_TIES = 64
_SMALLEST_TEMPERATURE = 1e-30  # below it float32 divides by zero; at it only the largest logit is left


class Memory(NamedTuple):
    """What penalties and guard remember of the ids so far, as device arrays; None where the sampling does not need it.

    seen: (n_ids,) bool, ids of prompt or output. counts: (n_ids,) float32, how often each id came in the output.
    quoted: the state of a `LanguageGuard`.
    """

    seen: Any = None
    counts: Any = None
    past: Past | None = None
    quoted: Any = None

    def arrays(self) -> list[Any]:
        """All arrays in it. They are evaluated with each step: a graph that nobody asks for would grow for ever."""
        past = () if self.past is None else (self.past.record, self.past.runs)
        return [array for array in (self.seen, self.counts, self.quoted, *past) if array is not None]


class Sampler:
    """Draws ids by one resolved `Sampling`. It has no state but a base key: memory goes in and comes out.

    n_ids: ids there are. breaker_ids: ids that no repeat crosses (DRY). guard: of the languages. salt: another stream
    of the same seed.
    Raises OptionError for a logit_bias beyond the vocabulary, or one that bans every id that the guard allows.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        seed: int,
        n_ids: int,
        breaker_ids: Iterable[int] = (),
        guard: LanguageGuard | None = None,
        salt: int = 0,
    ) -> None:
        self.sampling = sampling
        self.n_ids = n_ids
        self._seed, self._breaker_ids, self._guard = seed, tuple(breaker_ids), guard
        self._has_counts = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        is_dry = sampling.dry_multiplier > 0.0
        self._dry = Dry(sampling, n_ids=n_ids, breaker_ids=self._breaker_ids) if is_dry else None
        self._bias = _bias(sampling, n_ids, guard)
        # The split matters: key(seed) + i alone would give seed and seed + 1 overlapping streams.
        self._base = mx.random.split(mx.random.key(seed), 2)[0] + mx.array([salt, 0], mx.uint32)

    def other(self, sampling: Sampling, *, salt: int) -> Sampler:
        """A sampler of the same seed and vocabulary with other settings and its own random numbers."""
        return Sampler(
            sampling,
            seed=self._seed,
            n_ids=self.n_ids,
            breaker_ids=self._breaker_ids,
            guard=self._guard,
            salt=salt,
        )

    def start(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> Memory:
        """What is remembered after this prompt and output."""
        seen = counts = past = None
        if self._has_counts:
            every = mx.array([*prompt_ids, *output_ids], mx.int32)
            seen = mx.zeros(self.n_ids).at[every].add(1.0) > 0
            counts = mx.zeros(self.n_ids)
            if output_ids:
                counts = counts.at[mx.array(list(output_ids))].add(1.0)
        if self._dry is not None:
            past = self._dry.start([*prompt_ids, *output_ids])
        return Memory(seen, counts, past, None if self._guard is None else self._guard.start(output_ids))

    def push(self, memory: Memory, token_id: Any) -> Memory:
        """What is remembered once this id (scalar array, perhaps unread) came out."""
        seen, counts, past, quoted = memory
        if counts is not None:
            seen = seen | (mx.arange(self.n_ids) == token_id)
            counts = counts.at[token_id].add(1.0)
        if self._dry is not None and past is not None:
            past = self._dry.push(past, token_id)
        if self._guard is not None:
            quoted = self._guard.push(quoted, token_id)
        return Memory(seen, counts, past, quoted)

    def draw(self, logits: Any, memory: Memory, index: int) -> Any:
        """One id as a scalar uint32 array, unread.

        logits: (n_ids,) float32. index: which output id this is, from 0; it selects the key.
        """
        logits = self.adjusted(logits, memory)
        if self.sampling.is_greedy:
            return mx.argmax(logits)
        ids, values = kept(logits, self.sampling)
        chosen = mx.random.categorical(values, key=self._base + mx.array([0, index], mx.uint32))
        return chosen if ids is None else ids[chosen]

    def adjusted(self, logits: Any, memory: Memory) -> Any:
        """Logits after penalties, bias and guard: (n_ids,) float32."""
        repetition = _given(self.sampling.repetition_penalty)
        frequency = _given(self.sampling.frequency_penalty)
        presence = _given(self.sampling.presence_penalty)
        if repetition != 1.0:
            weaker = mx.where(logits < 0, logits * repetition, logits / repetition)
            logits = mx.where(memory.seen, weaker, logits)
        if frequency != 0.0:
            logits = logits - frequency * memory.counts
        if presence != 0.0:
            logits = logits - presence * (memory.counts > 0).astype(mx.float32)
        if self._dry is not None and memory.past is not None:
            logits = logits - self._dry.penalty(memory.past)
        if self._bias is not None:
            logits = logits + self._bias
        return logits if self._guard is None else self._guard.masked(logits, memory.quoted)


def kept(logits: Any, sampling: Sampling) -> tuple[Any | None, Any]:
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


def _bias(sampling: Sampling, n_ids: int, guard: LanguageGuard | None) -> Any | None:
    if not sampling.logit_bias:
        return None
    beyond = sorted(token_id for token_id in sampling.logit_bias if token_id >= n_ids)
    if beyond:
        raise OptionError(
            f"logit_bias has the id {beyond[0]:,}, expected ids from 0 to {n_ids - 1:,}, the tokenizer's last."
        )
    bias = [0.0] * n_ids
    for token_id, value in sampling.logit_bias.items():
        bias[token_id] = float(value)
    if all(value == -math.inf or (guard is not None and guard.foreign[i]) for i, value in enumerate(bias)):
        beside = "" if guard is None else " that the language guard allows"
        raise OptionError(f"logit_bias bans every id{beside}, so nothing could be drawn. Leave at least one.")
    return mx.array(bias)
