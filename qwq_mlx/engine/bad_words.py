"""Texts that must never be written, however the tokens cut them.

A ban on ids would forbid too much (the first token of a banned text begins many others) and too little (the same text
in other tokens). So tokens are drawn ahead while their text may still become a banned one; when it does, the run goes
back to the token that began it, forbids that id at that place, and draws again. Tokens are handed out where no banned
text can have begun: going back can never reach behind such a place, whatever is drawn instead.

Does not: look across an injection, or change the text that came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from qwq_mlx.engine.decoder import Decoder, Token
from qwq_mlx.engine.detokenizer import Pieces, StopScanner, TextStream
from qwq_mlx.engine.sampler import Sampler

__all__ = ["DrawnAhead", "Source"]


class Source(Protocol):
    """Where tokens come from: a Decoder, or a `DrawnAhead` around one."""

    def next(self, *, is_last: bool = False) -> Token:
        """The next token."""

    def force(self, ids: Sequence[int]) -> None:
        """Append ids that were not drawn."""

    def rewind(self, n_output: int, sampler: Sampler | None = None) -> None:
        """Go back to the first n_output ids, and draw on with this sampler."""

    def restore(self, prompt_ids: Sequence[int], output_ids: Sequence[int], cache: list[Any]) -> None:
        """Go on from a cache that holds a beginning of these ids."""


class DrawnAhead:
    """Hands out tokens once no banned text can begin with them any more.

    texts: the banned ones. stop_ids: ids that end the text, after which nothing is waited for.
    n_most: output ids there may be.
    """

    def __init__(
        self, decoder: Decoder, pieces: Pieces, texts: Sequence[str], *, stop_ids: frozenset[int], n_most: int
    ) -> None:
        self._decoder = decoder
        self._pieces = pieces
        self._texts = tuple(texts)
        self._stop_ids = stop_ids
        self._n_most = n_most
        self._ahead: deque[Token] = deque()  # drawn, not handed out
        self._n_settled = 0
        self._banned_at: dict[int, set[int]] = {}
        self._watch_from(0)

    def next(self, *, is_last: bool = False) -> Token:
        """The next settled token. is_last is known from n_most and ignored."""
        while not self._n_settled:
            self._draw()
        self._n_settled -= 1
        return self._ahead.popleft()

    def force(self, ids: Sequence[int]) -> None:
        """Append ids in place of what was drawn ahead."""
        self._drop()
        self._decoder.force(ids)
        self._watch_from(self._decoder.n_output)

    def rewind(self, n_output: int, sampler: Sampler | None = None) -> None:
        """Go back to the first n_output ids of those handed out, and draw on with this sampler."""
        self._drop()
        self._decoder.rewind(n_output, sampler)
        self._watch_from(n_output)

    def restore(self, prompt_ids: Sequence[int], output_ids: Sequence[int], cache: list[Any]) -> None:
        """Go on from a cache that holds a beginning of these ids."""
        self._decoder.restore(prompt_ids, output_ids, cache)
        self._watch_from(len(output_ids))

    def _drop(self) -> None:
        if self._ahead:
            self._decoder.rewind(self._decoder.n_output - len(self._ahead))
        self._ahead.clear()
        self._n_settled = 0

    def _watch_from(self, place: int) -> None:
        """Watch from this output place on; no banned text begins before it."""
        self._stream = TextStream(self._pieces)
        self._scanner = StopScanner(self._texts)
        self._origin = place
        self._starts: list[int] = []  # character at which each watched token's text begins
        self._n_chars = self._n_shown = 0
        self._banned_at = {each: ids for each, ids in self._banned_at.items() if each >= place}

    def _draw(self) -> None:
        token = self._decoder.next(is_last=self._decoder.n_output + 1 >= self._n_most)
        self._ahead.append(token)
        if token.id in self._stop_ids or self._watched(token.id):
            self._n_settled = len(self._ahead)

    def _watched(self, token_id: int) -> bool:
        """Watch one more token; whether this settles all that was drawn."""
        text = self._stream.feed(token_id)
        self._starts.append(self._n_chars)
        self._n_chars += len(text)
        released = self._scanner.feed(text)
        self._n_shown += len(released.text)
        if released.hit is not None:
            self._go_back(self._n_shown)
            return False
        if self._decoder.n_output >= self._n_most:
            return True
        if self._n_shown < self._n_chars or not self._stream.is_whole:
            return False
        self._watch_from(self._origin + len(self._starts))
        return True

    def _go_back(self, char: int) -> None:
        """To the token in which the banned text begins; its id is forbidden at that place from now on."""
        index = max(i for i, start in enumerate(self._starts) if start <= char)
        while index and self._starts[index - 1] == self._starts[index]:
            index -= 1  # tokens that released nothing hold the first bytes of the character
        place = self._origin + index
        banned = self._banned_at.setdefault(place, set())
        banned.add(self._decoder.ids[self._decoder.n_prompt + place])
        self._banned_at = {each: ids for each, ids in self._banned_at.items() if each <= place}
        for _ in range(self._decoder.n_output - place):
            self._ahead.pop()
        self._decoder.rewind(place, banned=tuple(banned))
        kept = self._decoder.ids[self._decoder.n_prompt + self._origin :]
        self._watch_from(self._origin)
        for token_id in kept:
            self._watched(token_id)
