"""The header of a safetensors file, read as if a stranger had made it, because one has.

A safetensors file is 8 bytes of length n, n bytes of JSON, then the tensors' bytes. Checked here: the length, every
field of every tensor, and that the tensors' data fill the file from the header to the last byte, without holes or
overlaps. What often lies in a shard's place (a git-lfs pointer, an HTML page) is called by its name.

Does not: read tensor data, accept anything that the reference refuses, or know sub-byte types (F4, F6), which no Qwen2
checkpoint has.
Source: README of huggingface/safetensors, section "Format"; tests compare with the safetensors package.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import open_to_read, read_at, recognise

__all__ = [
    "DTYPE_BYTES",
    "Header",
    "TensorEntry",
    "place_tensors",
    "read_header",
    "read_header_by",
]

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}

MAX_HEADER_BYTES = 8 << 20  # QwQ's shards have 6 kB; parsed, a hostile header takes up to 35 times its length
MAX_TENSORS = 40_000  # the largest conversion that the architecture allows; 500,000 empty ones cost mlx-lm 8 s
_MAX_NAME = 512
_MAX_DIMENSIONS = 8
_MAX_BYTES = 2**63 - 1
_MAX_DIGITS = 19
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_AGAIN = "Fetch the file again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: its bytes are file[start:end] (positions in the file, not in the data section).

    dtype: as safetensors spells it ("BF16"). The bytes are little-endian, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header.

    data_start: position of the first tensor's bytes.
    tensors: in the order of their data.
    names_in_file: of tensors that are read under another name (`tensor_names`), the name in the file.
    """

    path: Path
    size_bytes: int
    data_start: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    names_in_file: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; reads no tensor data.

    Raises SourceError naming the file, the tensor or the position, what was found and what a good file has.
    """
    fd = _open(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path}: is {_kind(status.st_mode)}, expected a safetensors file. {_AGAIN}")
        return read_header_by(lambda start, n_bytes: read_at(fd, n_bytes, start), path, status.st_size)
    finally:
        os.close(fd)


def read_header_by(read: Callable[[int, int], bytes], path: Path, size_bytes: int) -> Header:
    """The same for a file that is elsewhere: read(start, n_bytes) gives its bytes, size_bytes is its full size.

    path: where the file is or will be, for messages. At most 8 MiB are asked for, and only if the file has them.
    """
    raw = _read_raw(read, path, size_bytes)
    data_start = 8 + len(raw)
    tensors, metadata = _parse(raw, path, data_start)
    return Header(
        path=path,
        size_bytes=size_bytes,
        data_start=data_start,
        tensors=_in_order(tensors, path, data_start=data_start, size_bytes=size_bytes),
        metadata=metadata,
    )


def place_tensors(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Lay out a file: its first bytes (length and header) and where each tensor's bytes belong.

    tensors: (name, dtype, shape) in the order of the data. The entries' positions count from the start of the file.
    """
    entries, position = [], 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        entries.append(TensorEntry(name, dtype, shape, position, end))
        position = end
    head = _encode_header(entries, metadata)
    return head, tuple(
        TensorEntry(entry.name, entry.dtype, entry.shape, entry.start + len(head), entry.end + len(head))
        for entry in entries
    )


def _encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON header of a file that holds these tensors one after another, padded to a multiple of 8.

    entries: in the order of the data, without holes; only their distance from the first entry's start is written, so
    positions in the file and positions in the data section give the same bytes.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    base = None
    for entry in entries:
        base = entry.start if base is None else base
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start - base, entry.end - base],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _open(path: Path) -> int:
    try:
        return open_to_read(path)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be opened {system_said(error, 'Check that it exists and is readable.')}"
        ) from error


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _read_raw(read: Callable[[int, int], bytes], path: Path, size_bytes: int) -> bytes:
    """The JSON bytes, after checks that cost nothing."""
    first = read(0, min(512, size_bytes))
    if wrong := recognise(first):
        raise SourceError(f"{path}: is {wrong} ({size_bytes:,} bytes), expected a safetensors file. {_AGAIN}")
    if len(first) < 8:
        raise SourceError(f"{path}: has {size_bytes:,} bytes, expected at least 8 of a safetensors file. {_AGAIN}")
    (n_bytes,) = struct.unpack_from("<Q", first)
    if not 2 <= n_bytes <= MAX_HEADER_BYTES:
        raise SourceError(
            f"{path}: the header's length is {n_bytes:,}, expected 2 to {MAX_HEADER_BYTES:,} bytes. "
            f"This is no safetensors file. {_AGAIN}"
        )
    if n_bytes > size_bytes - 8:
        raise SourceError(
            f"{path}: the header has {n_bytes:,} bytes, but the file ends after {size_bytes - 8:,} of them. {_AGAIN}"
        )
    raw = read(8, n_bytes)
    if len(raw) != n_bytes:
        raise SourceError(
            f"{path}: read {len(raw):,} of {n_bytes:,} header bytes; the file changed meanwhile. {_AGAIN}"
        )
    return raw


def _parse(raw: bytes, path: Path, data_start: int) -> tuple[list[TensorEntry], dict[str, str]]:
    """Tensors in the order they stand in, each with bytes that fit its shape, and the metadata."""
    if not raw.startswith(b"{"):  # JSON may begin with spaces, a header may not
        raise SourceError(f"{path}: the header begins with {raw[:8]!r}, expected '{{'. The file is damaged. {_AGAIN}")
    header = parse_json_object(raw, what=f"{path}: the header", advice=_AGAIN, parse_int=_whole_number)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(_is_text(each) for pair in metadata.items() for each in pair):
        raise SourceError(f"{path}: {_METADATA} is {_short(metadata)}, expected an object of texts. {_AGAIN}")
    if len(header) > MAX_TENSORS:
        raise SourceError(
            f"{path}: has {len(header):,} tensors, expected at most {MAX_TENSORS:,}: no model of this kind has "
            "more. Check that it is the shard of a Qwen2 model, and fetch it again."
        )
    return [_entry(path, name, fields, data_start) for name, fields in header.items()], metadata


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
        raise SourceError(
            f"{path}: tensor name {name[:_MAX_NAME]!r}: expected 1 to {_MAX_NAME} printable characters. {_AGAIN}"
        )
    where = f"{path}: tensor {name}"
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        actual = list(fields) if isinstance(fields, dict) else fields
        raise SourceError(f"{where}: has {_short(actual)}, expected {', '.join(_FIELDS)} and nothing else. {_AGAIN}")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    width = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise SourceError(f"{where}: dtype is {_short(dtype)}, expected one of {', '.join(DTYPE_BYTES)}. {_AGAIN}")
    if not _are_whole(shape) or len(shape) > _MAX_DIMENSIONS:
        raise SourceError(
            f"{where}: shape is {_short(shape)}, expected at most {_MAX_DIMENSIONS} whole numbers from 0 to 10^19 - 1. "
            + _AGAIN
        )
    if not _are_whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"{where}: data_offsets are {_short(offsets)}, expected [begin, end]. {_AGAIN}")
    if math.prod(filter(None, shape)) * width > _MAX_BYTES:
        raise SourceError(f"{where}: shape {shape} overflows 64 bits. {_AGAIN}")
    n_bytes = math.prod(shape) * width
    if offsets[1] - offsets[0] != n_bytes:
        raise SourceError(
            f"{where}: has {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} needs {n_bytes:,}. {_AGAIN}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_number(digits: str) -> float:
    """An integer as the reference takes it; "-0" and what overflows become floats, which are refused everywhere."""
    return int(digits) if digits[0] != "-" and len(digits) <= _MAX_DIGITS else float(digits)


def _are_whole(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(each) is int for each in values)


def _is_text(value: object) -> bool:
    """JSON can spell half a surrogate pair, UTF-8 cannot."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


def _short(value: object) -> str:
    return reprlib.repr(value)[:200]


def _in_order(
    tensors: Iterable[TensorEntry], path: Path, *, data_start: int, size_bytes: int
) -> dict[str, TensorEntry]:
    """The tensors in the order of their data, which must fill the file from data_start to its end exactly once."""
    ordered = sorted(tensors, key=lambda entry: (entry.start, entry.end))
    position, before = data_start, "the header"
    for entry in ordered:
        if entry.start < position:
            raise SourceError(f"{path}: tensor {entry.name}: its data overlap those of {before}. {_AGAIN}")
        if entry.start > position:
            raise SourceError(
                f"{path}: tensor {entry.name}: the {_count_bytes(entry.start - position)} between it and {before} "
                f"belong to no tensor. {_AGAIN}"
            )
        position, before = entry.end, f"tensor {entry.name}"
    if size_bytes < position:
        raise SourceError(
            f"{path}: ends {_count_bytes(position - size_bytes)} early: has {size_bytes:,} bytes, its header describes "
            f"{position:,}. The file is truncated. {_AGAIN}"
        )
    if size_bytes > position:
        raise SourceError(
            f"{path}: has {_count_bytes(size_bytes - position)} after the last tensor, expected none. {_AGAIN}"
        )
    return {entry.name: entry for entry in ordered}


def _count_bytes(n: int) -> str:
    return "1 byte" if n == 1 else f"{n:,} bytes"
