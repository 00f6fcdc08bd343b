"""The one-token loop: the next step is under way before the last id is read.

A step feeds the ids that are not in the cache yet, draws an id from the last logits, and works out its log-probability
and the entropy, all as one graph that nobody waits for. `next` starts the step after (fed with the drawn, still unread
id) and only then reads, so Python's work hides behind the device's. Injecting ids, or going back, drops what is under
way; the cache holds exactly the ids that were read, so nothing has to be computed twice.

The prompt is fed as mlx-lm does it (chunks of all but the last id, then the last), so greedy ids are mlx-lm's.

Does not: decide when to stop, know texts, or accept a logit that is not finite (one NaN would become id 0 for ever).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.engine.activation_taps import Inspector, Looking, Seen
from qwq_mlx.engine.kv_cache import Layer, grow, layers_of, new_cache
from qwq_mlx.engine.sampler import Memory, Sampler
from qwq_mlx.errors import NotFiniteError, OptionError

__all__ = ["Decoder", "Token", "check_ids"]

_CLEAR_EVERY = 256  # steps between two returns of unused buffers to the system, as in mlx-lm


class Token(NamedTuple):
    """One id that was drawn. logprob, entropy: natural logarithms, over the model's own distribution (temperature 1, no
    penalties) of the ids its tokenizer has; entropy is None where it was not asked for. seen: what an Inspector saw."""

    id: int
    logprob: float
    entropy: float | None
    seen: Seen | None = None


class _Pending(NamedTuple):
    """A step under way: id (), stats (2,) = logprob, and entropy or the sum of the logits; memory as it will be once
    the id is out."""

    id: Any
    stats: Any
    memory: Memory
    looking: Looking | None


class Decoder:
    """Runs one sequence: `prefill`, then `next` for each id.

    module: mlx_lm's Qwen2. n_ids: ids the tokenizer has; rows of the embedding beyond are never drawn.
    cache: where to go on from; `ids` are then those it holds. inspector: looks into every step.
    with_entropy: work out each step's entropy.
    """

    def __init__(
        self,
        module: Any,
        sampler: Sampler,
        *,
        n_ids: int,
        cache: list[Any] | None = None,
        inspector: Inspector | None = None,
        with_entropy: bool = True,
    ) -> None:
        self.module = module
        self._with_entropy = with_entropy
        self._inspector = inspector
        self.sampler = sampler
        self.n_ids = n_ids
        self.cache = new_cache(module) if cache is None else cache
        self.ids: list[int] = []
        self.n_prompt = 0
        self._unfed: list[int] = []
        self._pending: _Pending | None = None
        self._memory = Memory()
        self._banned: tuple[int, ...] = ()

    @property
    def n_output(self) -> int:
        """Ids after the prompt, drawn or injected."""
        return len(self.ids) - self.n_prompt

    def prefill(self, ids: Sequence[int], *, step: int, n_cached: int = 0) -> Iterator[int]:
        """Feed a prompt in chunks; yields how many of its ids are in the cache after each. Exhaust it before `next`.

        n_cached: how many leading ids the cache holds already. Raises OptionError for ids beyond the vocabulary.
        """
        check_ids(ids, self.n_ids)
        if not 0 <= n_cached < len(ids):
            raise OptionError(f"n_cached is {n_cached}, expected from 0 to {len(ids) - 1}, the prompt's last place.")
        last = len(ids) - 1
        done = n_cached
        while done < last:
            n_now = min(step, last - done)
            grow(self.cache, n_now)
            self.module(mx.array([list(ids[done : done + n_now])]), cache=self.cache)
            for layer in self.cache:
                mx.eval(layer.state)  # one by one: the device's queue would hold the intermediates of many layers
            mx.clear_cache()
            done += n_now
            yield done
        self.ids = list(ids)
        self.n_prompt = len(ids)
        self._unfed = [ids[last]]
        self._memory = self.sampler.start(ids)

    def next(self, *, is_last: bool = False) -> Token:
        """Draw the next id. is_last: start no step after it.

        Raises NotFiniteError naming the step where a logit is NaN or infinite.
        """
        current = self._pending
        if current is None:
            current = self._launch(mx.array([self._unfed]), self._memory, self.n_output)
        self._unfed = []
        self._pending = None
        if not is_last:
            self._pending = self._launch(current.id.reshape(1, 1), current.memory, self.n_output + 1)
        logprob, second = current.stats.tolist()
        if not (math.isfinite(second) and math.isfinite(logprob)):
            self._pending = None
            raise NotFiniteError(
                f"Step {self.n_output:,}: the model's logits hold NaN or infinity, so the ids from here on would mean "
                "nothing. Check the weights (python -m qwq_mlx.verify FOLDER), or convert the source again."
            )
        seen = None
        if self._inspector is not None and current.looking is not None:
            seen = self._inspector.read(current.looking, self.n_output)
        # rounding may put either on the wrong side of 0 where one id has all the probability
        entropy = max(second, 0.0) if self._with_entropy else None
        token = Token(int(current.id.item()), min(logprob, 0.0), entropy, seen)
        self.ids.append(token.id)
        self._memory = current.memory
        if is_last:
            self._unfed = [token.id]
        if self.n_output % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return token

    def restore(self, prompt_ids: Sequence[int], output_ids: Sequence[int], cache: list[Any]) -> None:
        """Go on from a cache that holds a beginning of prompt and output; their rest is fed with the next draw."""
        check_ids([*prompt_ids, *output_ids], self.n_ids)
        self.cache = cache
        self.ids = [*prompt_ids, *output_ids]
        self.n_prompt = len(prompt_ids)
        self._unfed = self.ids[cache[0].offset :]
        self._pending = None
        self._memory = self.sampler.start(prompt_ids, output_ids)

    def cached(self, n_ids: int) -> list[Layer]:
        """What each layer's cache holds for the first n_ids at most."""
        return layers_of(self.cache, n_ids)

    def give_up(self, ids: Sequence[int]) -> tuple[list[Any] | None, int]:
        """Hand the cache over to who feeds these ids, cut to those it holds of them; all but the last at most.

        This decoder is not to be used any more. Returns None and 0 where not one id agrees.
        """
        n_known = min(self.cache[0].offset, len(self.ids), len(ids) - 1)
        n_same = next((place for place in range(n_known) if self.ids[place] != ids[place]), n_known)
        cache, self.cache, self._pending = self.cache, [], None
        if n_same < 1:
            return None, 0
        for layer in cache:
            layer.trim(layer.offset - n_same)
        return cache, n_same

    def force(self, ids: Sequence[int]) -> None:
        """Append ids that were not drawn; the next draw follows them. What is under way is dropped."""
        check_ids(ids, self.n_ids)
        self._pending = None
        self._banned = ()
        for token_id in ids:
            self._memory = self.sampler.push(self._memory, mx.array(token_id, mx.uint32))
        self._unfed += ids
        self.ids += ids

    def rewind(self, n_output: int, sampler: Sampler | None = None, banned: Sequence[int] = ()) -> None:
        """Go back to the first n_output ids of the output.

        sampler: draw on with this one. banned: ids that the next draw, and only it, must not give.
        """
        if not 0 <= n_output <= self.n_output:
            raise OptionError(f"Cannot go back to output id {n_output}; there are {self.n_output}.")
        self._pending = None
        self._banned = tuple(banned)
        self.sampler = sampler or self.sampler
        del self.ids[self.n_prompt + n_output :]
        n_kept = len(self.ids) - 1
        for layer in self.cache:
            layer.trim(max(0, layer.offset - n_kept))
        self._unfed = self.ids[self.cache[0].offset :]
        self._memory = self.sampler.start(self.ids[: self.n_prompt], self.ids[self.n_prompt :])

    def _launch(self, ids: Any, memory: Memory, index: int) -> _Pending:
        """Build and start one step. ids: (1, n), perhaps unread; index: of the output id that it draws."""
        inspector, n_before = self._inspector, self.cache[0].offset
        grow(self.cache, ids.shape[1])
        module = self.module if inspector is None else inspector.module
        logits = module(ids, cache=self.cache)[0, -1, : self.n_ids].astype(mx.float32)
        offered = logits if inspector is None else inspector.offered(logits, self.ids[:n_before], ids, index)
        allowed = offered.at[mx.array(self._banned)].add(-mx.inf) if self._banned else offered
        self._banned = ()
        drawn = self.sampler.draw(allowed, memory, index)
        log_total = mx.logsumexp(logits)
        # one number shows every logit that is not finite: of -inf the entropy makes 0 * -inf = NaN, the sum -inf
        is_asked = self._with_entropy
        second = log_total - (mx.exp(logits - log_total) * logits).sum() if is_asked else logits.sum()
        stats = mx.stack([logits[drawn] - log_total, second])
        looking = None if inspector is None else inspector.look(logits, log_total)
        pending = _Pending(drawn, stats, self.sampler.push(memory, drawn), looking)
        mx.async_eval(  # type: ignore[no-untyped-call]
            pending.id, pending.stats, *pending.memory.arrays(), *(() if looking is None else looking.arrays())
        )
        return pending


def check_ids(ids: Sequence[int], n_ids: int) -> None:
    """Raises OptionError naming the place of an id that the tokenizer does not have.

    One beyond the embedding reads foreign memory on the CPU and on Metal, or ends the process.
    """
    if not ids:
        raise OptionError("There are no ids, expected at least one.")
    for place, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < n_ids:
            raise OptionError(
                f"Place {place:,} holds the id {token_id!r}, expected a whole number from 0 to {n_ids - 1:,}."
            )
