"""JSON from outside that is one object, a file or a line of one: bounded, never from a FIFO, strictly parsed.

Does not: check what the object means.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qwq_mlx.errors import SourceError
from qwq_mlx.files.reading import read_regular_file, recognise

__all__ = ["parse_json_object", "read_json_object"]


def read_json_object(path: Path, *, limit_bytes: int, advice: str) -> dict[str, Any]:
    """Parse a file that holds one object, as `parse_json_object` does.

    advice: what the user should do next, the last sentence of every message.
    Raises SourceError naming the file, what was found and what was expected.
    """
    raw = read_regular_file(path, limit_bytes=limit_bytes, expected="JSON", advice=advice)
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as editors on Windows write it
    if wrong := recognise(raw[:512]):
        raise SourceError(f"{path}: is {wrong} ({len(raw):,} bytes), expected JSON. {advice}")
    return parse_json_object(raw, what=f"{path}:", advice=advice)


def parse_json_object(
    raw: bytes, *, what: str, advice: str, parse_int: Callable[[str], float] | None = None
) -> dict[str, Any]:
    """Parse UTF-8 JSON that is one object; NaN, Infinity and a key that stands twice are refused.

    what: the subject of every message ("config.json:" or "shard 1: the header"); advice: the end of it. parse_int: as
    `json.loads` takes it.
    Raises SourceError, also where the nesting is deeper than Python's recursion limit, and for a lone surrogate:
    "\\ud800" is JSON, but no text that could be written again.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{what} is not UTF-8 at byte {error.start:,}, expected JSON. {advice}") from error
    try:
        value = (_STRICT if parse_int is None else _decoder(parse_int)).decode(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{what} is not JSON ({str(error)[:200]}). {advice}") from error
    if b"\\u" in raw:
        _check_text(value, what, advice)
    if not isinstance(value, dict):
        raise SourceError(f"{what} holds a JSON {type(value).__name__}, expected an object. {advice}")
    return value


def _check_text(value: Any, what: str, advice: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise SourceError(f"{what} holds the lone surrogate U+{ord(letter):04X}, which is no text. {advice}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _decoder(parse_int: Callable[[str], float] | None) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=parse_int)


_STRICT = _decoder(None)  # made once: a file of questions has a million lines
