"""The language guard's mask: ids that would write letters of scripts the question does not use.

A Chinese character is often spread over two or three byte tokens, so a token that begins a character without finishing
it is judged by the characters it can begin.

Does not: know languages that share a script, or look at what is being written: the mask stands for the whole run.
"""

from __future__ import annotations

from collections.abc import Collection

from qwq_mlx.generate.text import Pieces
from qwq_mlx.reasoning.language import ScriptWatcher, allowed, script_of

__all__ = ["foreign_ids", "home_scripts"]


def home_scripts(question: str) -> frozenset[str]:
    """Scripts that an answer to this question may use."""
    return ScriptWatcher(question).home


def foreign_ids(pieces: Pieces, home: Collection[str]) -> list[int]:
    """Ids whose text has, or begins, a letter of another script. Walks the whole vocabulary once."""
    return [token_id for token_id in range(pieces.n_ids) if _is_foreign(pieces[token_id], home)]


def _is_foreign(piece: bytes, home: Collection[str]) -> bool:
    text = piece.decode("utf-8", errors="ignore")
    if not allowed(text, home):
        return True
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
