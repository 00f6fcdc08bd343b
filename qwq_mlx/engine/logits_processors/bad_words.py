"""Texts that must never be written, however the tokens cut them (vLLM's bad_words, over texts instead of ids).

A ban on ids would forbid too much (the first token of a banned text begins many others) and too little (the same text
in other tokens). So tokens are drawn ahead while their text may still become a banned one; when it does, the sequence
goes back to the token that began it, that id is masked at that place, and the draw is repeated. Tokens are handed out
where no banned text can have begun: going back can never reach behind such a place, whatever is drawn instead.

Does not: look across an injection, or change the text that came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.detokenizer import Pieces, StopScanner, TextStream
from qwq_mlx.engine.row import Row, Token

__all__ = ["BadWords"]


class BadWords:
    """Stands between the tokens of one sequence and who reads them, and is a logits processor of that sequence.

    row: the sequence. texts: the banned ones. stop_ids: ids that end the text, after which nothing is waited for.
    """

    def __init__(self, row: Row, pieces: Pieces, texts: Sequence[str], *, stop_ids: frozenset[int]) -> None:
        self._row = row
        self._pieces = pieces
        self._texts = tuple(texts)
        self._stop_ids = stop_ids
        self._ahead: deque[Token] = deque()  # drawn, not handed out
        self._n_settled = 0
        self._banned_at: dict[int, set[int]] = {}
        self._masked: tuple[int, frozenset[int]] | None = None  # a place in the output, and ids that it must not get
        self.watch_from(0)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Mask the ids that began a banned text where the next token stands; (1, n_ids) float32."""
        if self._masked is None or tokens.size != self._row.n_prompt + self._masked[0]:
            return logits
        return logits.at[:, mx.array(sorted(self._masked[1]))].add(-mx.inf)

    @property
    def has_settled(self) -> bool:
        """Whether a token waits to be handed out."""
        return self._n_settled > 0

    def next(self) -> Token:
        """Hand out the next settled token."""
        self._n_settled -= 1
        return self._ahead.popleft()

    def feed(self, token: Token) -> None:
        """Take the token that the sequence has just drawn."""
        self._ahead.append(token)
        if token.id in self._stop_ids or self._watch(token.id):
            self._n_settled = len(self._ahead)

    def drop(self) -> None:
        """Take back what was drawn ahead, before ids are injected or the sequence goes back."""
        if self._ahead:
            self._row.rewind(self._row.n_output - len(self._ahead))
        self._ahead.clear()
        self._n_settled = 0
        self._masked = None

    def watch_from(self, place: int) -> None:
        """Watch from this output place on; no banned text begins before it."""
        self._stream = TextStream(self._pieces)
        self._scanner = StopScanner(self._texts)
        self._origin = place
        self._starts: list[int] = []  # character at which each watched token's text begins
        self._n_chars = self._n_shown = 0
        self._banned_at = {each: ids for each, ids in self._banned_at.items() if each >= place}

    def _watch(self, token_id: int) -> bool:
        """Watch one more token; whether this settles all that was drawn."""
        text = self._stream.feed(token_id)
        self._starts.append(self._n_chars)
        self._n_chars += len(text)
        released = self._scanner.feed(text)
        self._n_shown += len(released.text)
        if released.hit is not None:
            self._go_back(self._n_shown)
            return False
        if self._row.is_full:
            return True
        if self._n_shown < self._n_chars or not self._stream.is_whole:
            return False
        self.watch_from(self._origin + len(self._starts))
        return True

    def _go_back(self, char: int) -> None:
        """To the token in which the banned text begins; its id is masked at that place from now on."""
        index = max(i for i, start in enumerate(self._starts) if start <= char)
        while index and self._starts[index - 1] == self._starts[index]:
            index -= 1  # tokens that released nothing hold the first bytes of the character
        place = self._origin + index
        banned = self._banned_at.setdefault(place, set())
        banned.add(self._row.ids[self._row.n_prompt + place])
        self._banned_at = {each: ids for each, ids in self._banned_at.items() if each <= place}
        for _ in range(self._row.n_output - place):
            self._ahead.pop()
        self._row.rewind(place)
        self._masked = place, frozenset(banned)
        kept = self._row.ids[self._row.n_prompt + self._origin :]
        self.watch_from(self._origin)
        for kept_id in kept:
            self._watch(kept_id)
