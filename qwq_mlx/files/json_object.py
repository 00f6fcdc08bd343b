"""JSON that holds one object: small files, read with a size limit and never from a FIFO, and strictly parsed.

Does not: check what the object means.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qwq_mlx.errors import SourceError
from qwq_mlx.files.reading import open_to_read, read_at, recognise

__all__ = ["parse_json_object", "read_json_object"]


def read_json_object(path: Path, *, limit_bytes: int, advice: str) -> dict[str, Any]:
    """Parse a file that holds one object, as `parse_json_object` does.

    advice: what the user should do next, the last sentence of every message.
    Raises SourceError naming the file, what was found and what was expected.
    """
    raw = _read(path, limit_bytes, advice)
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
    Raises SourceError, also where the nesting is deeper than Python's recursion limit.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{what} is not UTF-8 at byte {error.start:,}, expected JSON. {advice}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{what} is not JSON ({str(error)[:200]}). {advice}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{what} holds a JSON {type(value).__name__}, expected an object. {advice}")
    return value


def _read(path: Path, limit_bytes: int, advice: str) -> bytes:
    try:
        fd = open_to_read(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: there is no such file. {advice}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened ({error.strerror}). {advice}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path}: is not a regular file, expected JSON. {advice}")
        if status.st_size > limit_bytes:
            raise SourceError(f"{path}: has {status.st_size:,} bytes, expected at most {limit_bytes:,}. {advice}")
        return read_at(fd, status.st_size, 0)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
    finally:
        os.close(fd)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
