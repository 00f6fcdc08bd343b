"""The header of a safetensors file, read as if a stranger had made it, because one has.

A safetensors file is 8 bytes of length n, n bytes of JSON, then the tensors' bytes. The JSON has one fixed form, so it
is read by a parser of that form alone (`header_json`). Checked here: the length, and that the tensors' data fill the
file from the header to the last byte, without holes or overlaps. What often lies in a shard's place (a git-lfs pointer,
an HTML page) is called by its name.

Does not: read tensor data, or accept anything that the reference refuses.
Source: README of huggingface/safetensors, section "Format"; tests compare with the safetensors package.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.errors import SourceError
from qwq_mlx.files.header_json import DTYPE_BYTES, MAX_HEADER_BYTES, METADATA, TensorEntry, parse_header
from qwq_mlx.files.reading import open_to_read, read_at

__all__ = [
    "DTYPE_BYTES",
    "Header",
    "TensorEntry",
    "encode_header",
    "place_tensors",
    "read_header",
    "read_header_by",
    "recognise",
]

_AGAIN = "Fetch the file again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header. tensors: in the order of their data. data_start: position of the first tensor's bytes."""

    path: Path
    size_bytes: int
    data_start: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


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

    path: where the file is or will be, for messages. At most 100 MB are asked for, and only if the file has them.
    """
    raw = _read_raw(read, path, size_bytes)
    data_start = 8 + len(raw)
    tensors, metadata = parse_header(raw, where=str(path), data_start=data_start)
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
    head = encode_header(entries, metadata)
    return head, tuple(
        TensorEntry(entry.name, entry.dtype, entry.shape, entry.start + len(head), entry.end + len(head))
        for entry in entries
    )


def encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON header of a file that holds these tensors one after another, padded to a multiple of 8.

    entries: in the order of the data, without holes; only their distance from the first entry's start is written, so
    positions in the file and positions in the data section give the same bytes.
    """
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
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
            f"{path}: cannot be opened ({error.strerror}). Check that it exists and is readable."
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


def recognise(first: bytes) -> str | None:
    """What a file is, by its first bytes, if it is one of those that often stand in another's place."""
    text = first.lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    signatures = (
        (b"version https://git-lfs", "a git-lfs pointer, not the file it points to"),
        (b"<!doctype", "an HTML page"),
        (b"<html", "an HTML page"),
        (b"<?xml", "an XML page"),
        (b'{"error', "a JSON error message"),
        (b"pk\x03\x04", "a zip archive (PyTorch's format)"),
        (b"gguf", "a GGUF file"),
    )
    return next((name for start, name in signatures if text.startswith(start)), None)


def _in_order(
    tensors: Mapping[str, TensorEntry], path: Path, *, data_start: int, size_bytes: int
) -> dict[str, TensorEntry]:
    """The tensors in the order of their data, which must fill the file from data_start to its end exactly once."""
    ordered = sorted(tensors.values(), key=lambda entry: (entry.start, entry.end))
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
