"""The language mask: no letters of scripts that the question does not use, but in quotations, formulas and brackets.

Which ids are masked depends on whether the output is inside a quotation, and the next step starts before the last id is
read. So the state machine of `reasoning.quotation` is worked out for every id beforehand, as tables on the device: each
state's mask, and the state that each id leads to. A step looks up one row and one number.

An opening mark does not bypass the mask: what is open ends with its line, and a line has `QUOTED` foreign ids at most.
A Chinese character is often spread over two or three byte tokens, so a token that begins a character without finishing
it is judged by the characters it can begin.

So is a quotation mark: " ‹" is two tokens in Qwen's vocabulary, 13 ids begin a mark and 30 may end one. The bytes that
came of it are part of the state.

Does not: know languages that share a script, or quotations in quotations (see `reasoning.quotation`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.engine.detokenizer import Pieces
from qwq_mlx.engine.logits_processors import Incremental
from qwq_mlx.reasoning.quotation import MARKS, Quoting, followed
from qwq_mlx.reasoning.scripts import ScriptWatcher, allowed, script_of

__all__ = ["QUOTED", "LanguageMask", "LanguageTables", "home_scripts"]

QUOTED = 64
"""Foreign ids that quotations, formulas and brackets may hold in one line."""

_FOREIGN = "水"  # stands for letters of another script in a shape
_WORD = re.compile(r"[A-Za-z0-9]+")
# A byte that is no whole character is a lone surrogate, as in Python's "surrogateescape"; these may be a mark's.
_SPLIT_MARKS = {mark.encode().decode("ascii", "surrogateescape"): mark for mark in MARKS if not mark.isascii()}
_BEGINNINGS = {mark[:n] for mark in _SPLIT_MARKS for n in range(1, len(mark))}
_MARK_BYTES = frozenset("".join(_SPLIT_MARKS))
_OTHER = re.compile(f"[^A-Za-z0-9{_FOREIGN}{re.escape(''.join(sorted(MARKS | _MARK_BYTES)))}]+")


def home_scripts(question: str) -> frozenset[str]:
    """Scripts that an answer to this question may use."""
    return ScriptWatcher(question).home


class _State(NamedTuple):
    """Where in a quotation, and the bytes of a mark that is not finished."""

    quoting: Quoting = Quoting()
    bytes: str = ""


class LanguageTables:
    """The masks and transitions of one vocabulary and question, shared by all rows that have them.

    home: `home_scripts`. Walks the whole vocabulary once. foreign: (n_ids,) bool, on the host: ids whose text has, or
    begins, a letter of another script.
    """

    def __init__(self, pieces: Pieces, home: Collection[str]) -> None:
        shapes = [_shape(pieces[token_id], home) for token_id in range(pieces.n_ids)]
        kinds = {shape: kind for kind, shape in enumerate(dict.fromkeys(shapes))}
        self.kind_of = np.array([kinds[shape] for shape in shapes], np.uint32)
        self.after, masks = _tables(list(kinds))
        self.foreign = np.array([_FOREIGN in shape for shape in kinds])[self.kind_of]
        self.breaks = np.array(["\n" in shape for shape in kinds])[self.kind_of]
        # few states differ in what they mask; the last row masks what is foreign, quoted or not
        rows, row_of = np.unique(
            np.concatenate([masks, [[_FOREIGN in shape for shape in kinds]]]), axis=0, return_inverse=True
        )
        self.strict = int(row_of.ravel()[-1])
        self.masks = mx.array(rows[:, self.kind_of]), mx.array(row_of.ravel()[:-1].astype(np.uint32))
        self.on_device = mx.array(self.after), mx.array(self.kind_of), mx.array(self.breaks), mx.array(self.foreign)


class LanguageMask(Incremental):
    """Masks the ids that may not come next in one sequence.

    Its state is a (2,) int32 array: where in a quotation, and the foreign ids on this line.
    """

    def __init__(self, tables: LanguageTables) -> None:
        super().__init__()
        self._tables = tables
        self._start((), ())

    def _start(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        tables, state, n_foreign = self._tables, 0, 0
        line = next((place for place in range(len(output_ids) - 1, -1, -1) if tables.breaks[output_ids[place]]), 0)
        for token_id in output_ids[line:]:  # what comes before a line break does not matter behind it
            state = int(tables.after[state, tables.kind_of[token_id]])
            n_foreign = (0 if tables.breaks[token_id] else n_foreign) + int(tables.foreign[token_id])
        self._state = mx.array([state, n_foreign], mx.int32)

    def _push(self, token: Any) -> None:
        after, kinds, breaks, foreign = self._tables.on_device
        n_foreign = mx.where(breaks[token], 0, self._state[1]) + foreign[token].astype(mx.int32)
        self._state = mx.stack([after[self._state[0], kinds[token]].astype(mx.int32), n_foreign])

    def _apply(self, logits: Any) -> Any:
        masks, row_of = self._tables.masks
        row = mx.where(self._state[1] < QUOTED, row_of[self._state[0]], self._tables.strict)
        return mx.where(masks[row], -mx.inf, logits)


def _tables(shapes: Sequence[str]) -> tuple[Any, Any]:
    """after: (states, shapes) uint16, the state that each leads to. masks: (states, shapes) bool, whether each has
    foreign letters that nothing quotes. The states are those that can be reached, the beginning's first."""
    states = {_State(): 0}
    after, masks = [], []
    left = list(states)
    known: dict[tuple[_State, str], tuple[_State, bool]] = {}
    for state in left:  # which grows meanwhile
        # bytes that the next shape does not go on with come to nothing, so most walks begin without any
        without = _State(followed(state.quoting, " ", brackets=True)) if state.bytes else state
        starts = [(state if shape[:1] in _MARK_BYTES else without, shape) for shape in shapes]
        for start in starts:
            if start not in known:
                known[start] = _walked(*start)
        ends, is_foreign = zip(*(known[start] for start in starts), strict=True)
        for end in sorted(set(ends).difference(states)):
            states[end] = len(states)
            left.append(end)
        after.append([states[end] for end in ends])
        masks.append(is_foreign)
    return np.array(after, np.uint16), np.array(masks)


def _walked(state: _State, shape: str) -> tuple[_State, bool]:
    """The state behind a shape, and whether foreign letters in it stand outside of a quotation."""
    (quoting, unfinished), is_foreign = state, False
    for char in shape:
        if unfinished + char in _BEGINNINGS:
            unfinished += char
            continue
        mark = _SPLIT_MARKS.get(unfinished + char)
        if unfinished and mark is None:  # it became another character, or none
            quoting = followed(quoting, " ", brackets=True)
        unfinished = char if mark is None and char in _BEGINNINGS else ""
        if not unfinished:
            is_foreign |= char == _FOREIGN and not quoting.is_open
            quoting = followed(quoting, mark or (" " if char in _MARK_BYTES else char), brackets=True)
    return _State(quoting, unfinished), is_foreign


def _shape(piece: bytes, home: Collection[str]) -> str:
    """What the mask sees of a piece: its marks and their bytes as they are, and one character for each run of anything
    else."""
    text = piece.decode("utf-8", errors="surrogateescape")
    if not text.isascii():
        kept = MARKS | _MARK_BYTES
        text = "".join(char if char.isascii() or char in kept else _sign(char, home) for char in text)
    shape = _OTHER.sub(" ", _WORD.sub("a", text))
    return re.sub(f"{_FOREIGN}+", _FOREIGN, shape + _FOREIGN * _begins_foreign(piece, home))


def _sign(char: str, home: Collection[str]) -> str:
    return " " if allowed(char, home) else _FOREIGN


def _begins_foreign(piece: bytes, home: Collection[str]) -> bool:
    """Whether a piece ends in the beginning of a character that can only be a letter of another script."""
    scripts = {script_of(character) for character in _beginnings(piece)}
    return bool(scripts) and None not in scripts and not scripts & set(home)


def _beginnings(piece: bytes) -> list[str]:
    """Characters that the unfinished end of a piece may become: the first, middle and last of their range."""
    for n_bytes in (1, 2, 3):
        end = piece[-n_bytes:]
        if len(end) < n_bytes or not 0xC2 <= end[0] <= 0xF4 or any(not 0x80 <= byte < 0xC0 for byte in end[1:]):
            continue
        length = 2 if end[0] < 0xE0 else 3 if end[0] < 0xF0 else 4
        if n_bytes >= length:
            continue
        lead = end[0] & (0xFF >> (length + 1))
        low = lead
        for byte in end[1:]:
            low = low << 6 | byte & 0x3F
        n_free = 6 * (length - n_bytes)
        codes = (low << n_free, (low << n_free) + (1 << n_free) // 2, ((low + 1) << n_free) - 1)
        return [chr(code) for code in codes if 0x80 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF]
    return []
