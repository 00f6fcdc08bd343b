"""A Trace on disk: JSON lines that anybody can read, one a token, and hidden states beside them in safetensors.

    {"format": "qwq_mlx trace", "schema_version": 4, "n_tokens": 2, ...}   all but the tokens
    {"id": 40, "text": "a", "logprob": -0.5, "entropy": 1.25}              one line a token, in order
    {"id": 41, "text": "b", "logprob": -0.1, "entropy": 0.75, "margin": 0.9, "alternatives": [[41, "b", -0.1], ...]}
    {"end": 2, "sha256": "..."}                                            of all bytes before this line

Hidden states lie in NAME.<digest>.safetensors, one (tokens, hidden_size) float32 tensor a layer, NaN where nothing was
seen; the first line holds the whole sha256 of that file. It is written before the lines get their name, so at every
moment the lines name arrays that are there; what an older trace of that name left is removed last.

Does not: know what the fields mean (`trace` does).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwq_mlx.errors import SavingError, SourceError, system_said
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.header import place_tensors, read_header
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file

__all__ = ["read_trace", "write_trace"]

_FORMAT = "qwq_mlx trace"
_ADVICE = "Give the file that save() wrote."
_MAX_BYTES = 4 << 30  # 131,072 tokens with 50 alternatives each take less
_MAX_HIDDEN_BYTES = 1 << 40


def write_trace(
    path: Path, fields: Mapping[str, Any], tokens: list[dict[str, Any]], hidden: Mapping[int, Any], *, schema: int
) -> None:
    """Write a trace; the file appears whole or not at all. hidden: layer -> (tokens, hidden_size) float32.

    Raises SavingError where the disk does not take it.
    """
    arrays = _arrays_bytes(hidden) if hidden else None
    beside, is_new = path, False
    try:
        named = None
        if arrays is not None:
            digest = hashlib.sha256(arrays).hexdigest()
            beside = path.with_name(f"{path.name}.{digest[:12]}.safetensors")
            is_new = not beside.exists()
            write_file(beside, arrays)
            named = {"file": beside.name, "sha256": digest}
        first = {"format": _FORMAT, "schema_version": schema, "n_tokens": len(tokens), "hidden": named, **fields}
        body = b"".join(_line(each) for each in (first, *tokens))
        last = {"end": len(tokens), "sha256": hashlib.sha256(body).hexdigest()}
        write_file(path, body + _line(last))
        for other in path.parent.glob(f"{_literal(path.name)}.*.safetensors"):
            if other != beside and re.fullmatch(r"[0-9a-f]{12}", other.name[len(path.name) + 1 : -len(".safetensors")]):
                other.unlink()
    except OSError as error:
        if is_new:
            beside.unlink(missing_ok=True)  # no lines name it
        raise SavingError(
            f"{path}: the trace cannot be saved {system_said(error, 'Make room, or give another place.')}", error
        ) from error


def read_trace(path: Path, *, schemas: Collection[int]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, Any]]:
    """Fields with the schema, tokens and hidden states of a file that `write_trace` wrote, every byte checked.

    Raises SourceError: it cannot be read, is of another format or schema, torn, damaged or edited, or its arrays are.
    """
    raw = read_regular_file(path, limit_bytes=_MAX_BYTES, expected="a trace", advice=_ADVICE)
    lines = raw.split(b"\n")
    fields = _object(lines[0], path, 1)
    if fields.pop("format", None) != _FORMAT and "schema_version" not in fields:
        raise SourceError(f"{path}: is no trace of qwq_mlx. {_ADVICE}")
    version = fields.get("schema_version")
    if type(version) is not int or version not in schemas:
        raise SourceError(
            f"{path}: schema_version is {version!r}, expected {_listed(schemas)}. "
            "Read the trace with the version of qwq_mlx that wrote it."
        )
    last = _object(lines[-2], path, len(lines) - 1) if len(lines) > 2 and not lines[-1] else {}
    if last.keys() != {"end", "sha256"}:
        raise SourceError(f"{path}: the last line is missing, so the file was cut off. Copy it again.")
    if hashlib.sha256(raw[: -len(lines[-2]) - 1]).hexdigest() != last["sha256"]:
        raise SourceError(f"{path}: the sha256 does not fit, so the file is damaged or edited. Save the trace again.")
    tokens = [_object(line, path, place) for place, line in enumerate(lines[1:-2], start=2)]
    n_tokens = fields.pop("n_tokens", None)
    if not len(tokens) == last["end"] == n_tokens:
        raise SourceError(
            f"{path}: holds {len(tokens):,} tokens, its first line says {n_tokens!r}, its last {last['end']!r}. "
            "The file is edited; save the trace again."
        )
    named = fields.pop("hidden", None)
    return fields, tokens, {} if named is None else _read_arrays(path, named, len(tokens))


def _object(line: bytes, path: Path, place: int) -> dict[str, Any]:
    return parse_json_object(
        line, what=f"{path}: line {place:,}", advice="The file is damaged or no trace; save the trace again."
    )


def _read_arrays(path: Path, named: Any, n_tokens: int) -> dict[int, Any]:
    if not isinstance(named, dict) or named.keys() != {"file", "sha256"} or Path(str(named["file"])).name in ("", ".."):
        raise SourceError(f"{path}: the name of the hidden states is {named!r}. The file is edited; save it again.")
    beside = path.with_name(Path(str(named["file"])).name)
    raw = read_regular_file(
        beside,
        limit_bytes=_MAX_HIDDEN_BYTES,
        expected=f"the hidden states of {path.name}",
        advice=f"They belong to {path.name}: keep both files together.",
    )
    if hashlib.sha256(raw).hexdigest() != named["sha256"]:
        raise SourceError(
            f"{beside}: the sha256 does not fit {path.name}, so the hidden states are damaged or others'."
        )
    header = read_header(beside)
    hidden = {}
    for name, entry in header.tensors.items():
        if entry.dtype != "F32" or len(entry.shape) != 2 or entry.shape[0] != n_tokens or not name.isdecimal():
            raise SourceError(f"{beside}: {name} is {entry.dtype} {entry.shape}, expected F32 ({n_tokens}, hidden).")
        data = np.frombuffer(raw, np.dtype("<f4"), count=(entry.end - entry.start) // 4, offset=entry.start)
        hidden[int(name)] = data.reshape(entry.shape)
    return hidden


def _arrays_bytes(hidden: Mapping[int, Any]) -> bytes:
    head, _ = place_tensors((str(layer), "F32", tuple(array.shape)) for layer, array in hidden.items())
    return head + b"".join(np.ascontiguousarray(array, np.dtype("<f4")).tobytes() for array in hidden.values())


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _listed(schemas: Collection[int]) -> str:
    *first, last = map(str, sorted(schemas))
    return f"{', '.join(first)} or {last}" if first else last


def _literal(name: str) -> str:
    """A file name as a glob pattern that only it matches."""
    return re.sub(r"([*?\[])", r"[\1]", name)
