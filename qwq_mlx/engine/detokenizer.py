"""Ids become text as they come: bytes by id, UTF-8 finished before it is shown, stop texts held back.

A byte-level token is a run of bytes, and a character may be spread over several. Each id's bytes go through an
incremental UTF-8 decoder: what is complete comes out, what is not waits, what can never be text becomes U+FFFD exactly
where the decoded whole has it. That is linear in the ids, and the pieces joined equal `tokenizer.decode` of all ids.

Does not: hide control tokens (the caller leaves out the id that ended the run), or know decoders other than ByteLevel,
which all Qwen2 tokenizers use.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qwq_mlx.errors import LoadError
from qwq_mlx.model.tokenizer import LoadedTokenizer

__all__ = ["Pieces", "Released", "StopScanner", "TextStream", "decode", "first_other"]


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: Latin-1's printable ones as they are, others above."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Pieces:
    """id -> bytes for one tokenizer, each looked up once."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        backend = tokenizer.hf.backend_tokenizer
        decoder = type(backend.decoder).__name__
        if decoder != "ByteLevel":
            raise LoadError(
                f"tokenizer.json: the decoder is {decoder}, expected ByteLevel as in every Qwen2 tokenizer. "
                "Take tokenizer.json from the model's source again."
            )
        self._backend: Any = backend
        self._known: dict[int, bytes] = {}
        self.n_ids = tokenizer.n_ids

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of an id; none for an id that the tokenizer leaves out (a hole in its vocabulary)."""
        piece = self._known.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) or ""
            if all(character in _BYTES for character in token):
                piece = bytes(_BYTES[character] for character in token)
            else:  # an added token is kept as text; one with a space in it is none of the byte characters
                piece = token.encode()
            self._known[token_id] = piece
        return piece

    def holding(self, texts: Sequence[str]) -> list[int]:
        """Ids whose bytes contain one of the texts (for DRY's breakers); walks the whole vocabulary once."""
        wanted = [text.encode() for text in texts]
        return [i for i in range(self.n_ids) if any(text in self[i] for text in wanted)]


class TextStream:
    """Feed ids one by one; get the text that each completes."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text this id completes; "" while a character is unfinished."""
        return self._decoder.decode(self._pieces[token_id])

    @property
    def is_whole(self) -> bool:
        """Whether no character is unfinished."""
        return not self._decoder.getstate()[0]

    def finish(self) -> str:
        """What an unfinished character at the end becomes (U+FFFD), or ""."""
        return self._decoder.decode(b"", final=True)


def decode(pieces: Pieces, ids: Iterable[int]) -> str:
    """The text of these ids at once."""
    return b"".join(pieces[token_id] for token_id in ids).decode("utf-8", errors="replace")


def first_other(pieces: Pieces, ids: Sequence[int], texts: Sequence[str]) -> int | None:
    """The place of the first id that another tokenizer gave its text; None where there is none.

    texts: what each id let out when it was written; the last ones end before a stop id or text.
    """
    text, expected = decode(pieces, ids), "".join(texts).rstrip("\ufffd")
    if text.startswith(expected):
        return None
    end = next(place for place in range(len(expected)) if text[place : place + 1] != expected[place])
    return next(place for place, n_written in enumerate(itertools.accumulate(map(len, texts))) if n_written > end)


class Released(NamedTuple):
    """text: what may be shown now. hit: the stop text that was completed, or None."""

    text: str
    hit: str | None = None


class StopScanner:
    """Finds stop texts across token borders and never shows the beginning of one.

    One Knuth-Morris-Pratt automaton per stop text, so the work is linear in the text however the stop texts look.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str) -> Released:
        """Take the next text; what cannot be part of a stop text any more comes out. After a hit, feed nothing."""
        if not self._stops:
            return Released(text)
        self._held += text
        start = len(self._held) - len(text)
        for offset, character in enumerate(text):
            hits = []
            for index, (stop, borders) in enumerate(self._stops):
                n_matched = _advance(stop, borders, self._matched[index], character)
                self._matched[index] = n_matched
                if n_matched == len(stop):
                    hits.append(stop)
            if hits:
                hit = max(hits, key=len)
                shown = self._held[: start + offset + 1 - len(hit)]
                self._held = ""
                return Released(shown, hit)
        n_kept = max(self._matched)
        shown = self._held[: len(self._held) - n_kept]
        self._held = self._held[len(shown) :]
        return Released(shown)

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """borders[n]: length of the longest proper beginning of stop[:n] that is also its end."""
    borders = [0, 0]
    n_matched = 0
    for character in stop[1:]:
        while n_matched and stop[n_matched] != character:
            n_matched = borders[n_matched]
        n_matched += stop[n_matched] == character
        borders.append(n_matched)
    return borders


def _advance(stop: str, borders: list[int], n_matched: int, character: str) -> int:
    if n_matched == len(stop):
        n_matched = borders[n_matched]
    while n_matched and stop[n_matched] != character:
        n_matched = borders[n_matched]
    return n_matched + (stop[n_matched] == character)
