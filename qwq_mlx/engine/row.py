"""One row of a pass: its ids, its KV cache, how its next id is drawn, and the step under way (nano-vllm's
Sequence, nanochat's RowState).

A row may be run alone or beside others; nothing of it is shared. Injecting ids, or going back, drops the step under
way and what was drawn ahead; the cache then holds exactly the ids that were read, so nothing has to be computed twice.

Does not: run the model (`decoder` does), or know texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.engine.activation_taps import Looking, Seen
from qwq_mlx.engine.kv_cache import Layer, layers_of
from qwq_mlx.engine.logits_processors import Incremental, LogitsProcessor
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.errors import OptionError
from qwq_mlx.model.memory.activations import n_positions
from qwq_mlx.options import Inspect

__all__ = ["Drawn", "Pending", "ProcessorStates", "Ready", "Row", "Token", "check_ids"]

ProcessorStates = Mapping[int, dict[str, Any]]
"""What the processors with a state knew at a draw, by their place in the list."""


class Token(NamedTuple):
    """One id that was drawn.

    logprob, entropy: in nats, over the model's own distribution (temperature 1, no processors) of the ids that its
      tokenizer has; entropy is None where it was not asked for.
    seen: what `Inspect` asked for, else None.
    """

    id: int
    logprob: float
    entropy: float | None
    seen: Seen | None = None


class Drawn:
    """Ids that were drawn together, and what belongs to each; unread until `read`.

    ids: (n,) uint32. stats: (n, 2) float32, the log-probability, and the entropy or the sum of the logits.
    """

    def __init__(self, ids: Any, stats: Any) -> None:
        self.ids, self.stats = ids, stats
        self._read: tuple[list[int], list[list[float]]] | None = None

    def arrays(self) -> list[Any]:
        """All arrays in it, to be computed with the step."""
        return [self.ids, self.stats]

    def read(self) -> tuple[list[int], list[list[float]]]:
        """Wait for them: ids and statistics."""
        if self._read is None:
            self._read = self.ids.tolist(), self.stats.tolist()
        return self._read


class Pending(NamedTuple):
    """A step under way.

    drawn: its id is among these. place: there.
    tokens: (n,) uint32 with the drawn id at its end, None where no processor asks for it.
    """

    drawn: Drawn
    place: int
    tokens: Any | None
    looking: Looking | None

    @property
    def id(self) -> Any:
        """() uint32."""
        return self.drawn.ids[self.place]

    def arrays(self) -> list[Any]:
        """All arrays in it, to be computed with the step."""
        tokens = () if self.tokens is None else (self.tokens,)
        return [*self.drawn.arrays(), *tokens, *(() if self.looking is None else self.looking.arrays())]


class Ready(NamedTuple):
    """A token that was read and not handed out yet, or why there is none.

    tokens: (n,) uint32 with its id at their end, None where no processor asks for it.
    states: of the processors when it was drawn; None where they know no token that came after.
    """

    token: Token | Exception
    tokens: Any | None = None
    states: ProcessorStates | None = None


class Row:
    """Ids of one row, with what they follow from.

    sampler: draws the ids; it may be exchanged at any time.
    cache: KV cache by layer; what it holds of other ids is the caller's to cut off.
    processors: logits processors, in their order. hooks: the user's own, which come first; what they return is checked.
    max_tokens: output ids there may be; None is no limit.
    inspect: what every token shows besides.

    may_draft: whether ids may be drafted for it; its owner says.
    n_restarts: how often the ids became others than those before with some more; drafters look at it.
    drafted, accepted: ids that were guessed for it, and those of them that it drew itself, by source.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        cache: list[Any],
        processors: Sequence[LogitsProcessor] = (),
        hooks: Sequence[LogitsProcessor] = (),
        max_tokens: int | None = None,
        inspect: Inspect | None = None,
    ) -> None:
        self.sampler = sampler
        self.cache = cache
        self.processors = list(processors)
        self.hooks = tuple(hooks)
        self.max_tokens = max_tokens
        self.inspect = inspect or Inspect()
        self.ids: list[int] = []
        self.n_prompt = 0
        self.unfed: list[int] = []
        self.pending: Pending | None = None
        self.ready: deque[Ready] = deque()
        self.may_draft = True
        self.n_restarts = 0
        self.drafted: dict[str, int] = {}
        self.accepted: dict[str, int] = {}
        self.failure: Exception | None = None  # why no step can follow
        self._tokens: Any | None = None

    @property
    def n_output(self) -> int:
        """Ids after the prompt, drawn or injected."""
        return len(self.ids) - self.n_prompt

    @property
    def is_full(self) -> bool:
        """Whether there are as many output ids as there may be."""
        return self.max_tokens is not None and self.n_output >= self.max_tokens

    @property
    def is_at_last(self) -> bool:
        """Whether the next id is the last there may be, so that no step need follow it."""
        return self.max_tokens is not None and self.n_output + 1 >= self.max_tokens

    @property
    def most_drafts(self) -> int:
        """Ids that may be drafted for the next pass.

        No more than may be written, nor than the cache has room for, since attention over a quantized cache rounds
        otherwise in a larger room. None where a hook of the user's is to see each token once, and no other.
        """
        cache = self.cache[0]
        if self.hooks or not self.may_draft or cache.room == 0 or self.failure is not None:
            return 0
        most: int = (cache.room - cache.offset or n_positions(cache.offset + 1) - cache.offset) - 1
        return most if self.max_tokens is None else max(0, min(most, self.max_tokens - self.n_output - 1))

    @property
    def tokens(self) -> Any:
        """All known ids as a (n,) uint32 array."""
        if self._tokens is None:
            self._tokens = mx.array(self.ids, mx.uint32)
        return self._tokens

    def start(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Begin behind a prompt, or go on behind prompt and output; what the cache lacks is fed with the next step."""
        self.ids = [*prompt_ids, *output_ids]
        self.n_prompt = len(prompt_ids)
        self._restart()

    @property
    def has_processors(self) -> bool:
        """Whether anything looks at `tokens`."""
        return bool(self.hooks or self.processors)

    def offered(self, tokens: Any, logits: Any, index: int) -> tuple[Any, Any | None]:
        """The logits to draw from, (n_ids,) float32, and the logsumexp of what the hooks returned, None without any.

        tokens: (n,) uint32, perhaps unread. index: of the output id to be drawn, for messages.
        Raises OptionError where a hook returns something else than logits.
        """
        if not self.has_processors:
            return logits, None
        changed, total = logits[None], None
        for hook in self.hooks:
            changed = _checked(hook(tokens, changed), changed.shape, index)
        if self.hooks:
            total = mx.logsumexp(changed)
        for processor in self.processors:
            changed = processor(tokens, changed)
        return changed[0], total

    def states(self) -> ProcessorStates:
        """What the processors that have a state know now."""
        incremental = ((place, each) for place, each in enumerate(self.processors) if isinstance(each, Incremental))
        return {place: each.state() for place, each in incremental}

    def take(self) -> Token | None:
        """Hand out the first token that is ready, whose id is appended; None where there is a failure instead."""
        token, tokens, states = self.ready.popleft()
        if isinstance(token, Exception):
            self.pending, self.failure = None, token
            return None
        self.ids.append(token.id)
        self._tokens = tokens
        self.unfed = self.ids[self.cache[0].offset :]
        for place, state in (states or {}).items():
            processor = self.processors[place]
            assert isinstance(processor, Incremental), "it gave the state"
            processor.restore(state)
        return token

    def count_draft(self, source: str, n_drafted: int, n_accepted: int) -> None:
        """Enter a draft that was checked."""
        self.drafted[source] = self.drafted.get(source, 0) + n_drafted
        self.accepted[source] = self.accepted.get(source, 0) + n_accepted

    def force(self, ids: Sequence[int]) -> None:
        """Append ids that were not drawn; the next draw follows them. What was drawn ahead is dropped."""
        self.pending = self.failure = None  # of a step that is not wanted any more
        self.ready.clear()
        self.cut_cache(len(self.ids))
        self.unfed = [*self.ids[self.cache[0].offset :], *ids]
        self.ids += ids
        self._tokens = None

    def draw_again(self) -> None:
        """Drop what was drawn ahead, as another sampler is to draw it."""
        if not self.ids:
            return
        self.pending = None
        self.ready.clear()
        self.cut_cache(len(self.ids) - 1)
        self.unfed = self.ids[self.cache[0].offset :]

    def rewind(self, n_output: int) -> None:
        """Go back to the first n_output ids of the output. Raises OptionError where there are fewer."""
        if not 0 <= n_output <= self.n_output:
            raise OptionError(f"Cannot go back to output id {n_output}; there are {self.n_output}.")
        del self.ids[self.n_prompt + n_output :]
        self.cut_cache(len(self.ids) - 1)
        self._restart()

    def cut_cache(self, n_ids: int) -> None:
        """Cut the cache back to n_ids positions, where it holds more."""
        for layer in self.cache:
            layer.trim(max(0, layer.offset - n_ids))

    def _restart(self) -> None:
        self.pending = self.failure = None
        self.ready.clear()
        self.n_restarts += 1
        self._tokens = None
        self.unfed = self.ids[self.cache[0].offset :]
        for processor in self.processors:
            if isinstance(processor, Incremental):
                processor.start(self.ids[: self.n_prompt], self.ids[self.n_prompt :])

    def cached(self, n_ids: int) -> list[Layer]:
        """What each layer's cache holds for the first n_ids at most; views, not copies."""
        return layers_of(self.cache, n_ids)

    def release_cache(self, ids: Sequence[int]) -> tuple[list[Any] | None, int]:
        """Hand the cache over to who feeds these ids, cut to those it holds of them; all but the last at most.

        This row is not to be used any more. Returns None and 0 where not one id agrees, or the cache has gone already.
        """
        if not self.cache:
            return None, 0
        n_known = min(self.cache[0].offset, len(self.ids), len(ids) - 1)
        n_same = next((place for place in range(n_known) if self.ids[place] != ids[place]), n_known)
        cache, self.cache, self.pending = self.cache, [], None
        if n_same < 1:
            return None, 0
        for layer in cache:
            layer.trim(layer.offset - n_same)
        return cache, n_same


def _checked(changed: Any, shape: tuple[int, ...], index: int) -> Any:
    """What a hook returned, as float32."""
    if not isinstance(changed, mx.array) or changed.shape != shape:
        what = f"an array of shape {changed.shape}" if isinstance(changed, mx.array) else type(changed).__name__
        raise OptionError(
            f"A logits processor returned {what} at step {index:,}, expected an mx.array of shape {shape}."
        )
    return changed.astype(mx.float32)


def check_ids(ids: Sequence[int], n_ids: int) -> None:
    """Raises OptionError naming the place of an id that the tokenizer does not have.

    An id past the embedding table reads out of bounds on the CPU and on Metal, or crashes.
    """
    if not ids:
        raise OptionError("There are no ids, expected at least one.")
    for place, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < n_ids:
            raise OptionError(
                f"Place {place:,} holds the id {token_id!r}, expected a whole number from 0 to {n_ids - 1:,}."
            )
