"""Logits processors: callables `(tokens, logits) -> logits` that change what may be drawn, in the order of a list.

The signature is mlx-lm's, so its own processors can stand in the same list:

    tokens: (n,) uint32, the ids of prompt and output so far. logits: (1, n_ids) float32. Returns logits of that shape.

Both arrays may be unread: a step is built while the step before still runs on the device. A processor that reads one
(`.item()`) works, and makes every step wait.

A processor with a state of its own follows the tokens one by one (`Incremental`): it works on the new ones, and is told
by `start` where the sequence went back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Incremental", "LogitsProcessor"]

LogitsProcessor = Callable[[Any, Any], Any]
"""processor(tokens, logits) -> logits, see the module."""


class Incremental(ABC):
    """A processor whose state grows token by token on the device, without one being read back."""

    def __init__(self) -> None:
        self._n_seen = 0

    def start(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Take the state that these ids lead to; called where a sequence begins, is resumed or goes back."""
        self._n_seen = len(prompt_ids) + len(output_ids)
        self._start(prompt_ids, output_ids)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """See the module. Raises nothing; before `start` the state is that of no tokens."""
        for place in range(self._n_seen, tokens.size):
            self._push(tokens[place])
        self._n_seen = tokens.size
        return self._apply(logits)

    def state(self) -> dict[str, Any]:
        """What it knows now, for `restore`; arrays are shared, for a push replaces them and never writes into one."""
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        """Know what it knew when `state` gave this, and no token that came after."""
        vars(self).update(state)

    @abstractmethod
    def _start(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Work the state out from ids that are known."""

    @abstractmethod
    def _push(self, token: Any) -> None:
        """Take one more token, a scalar array that may be unread."""

    @abstractmethod
    def _apply(self, logits: Any) -> Any:
        """The changed logits, (1, n_ids) float32."""
