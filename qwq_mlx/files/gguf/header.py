"""The header of a GGUF file, read as if a stranger had made it, because one has.

A GGUF file is magic, version, two counts, metadata (key, type, value), one entry for every tensor, and the tensors'
bytes, each aligned. Checked here: every length and count against what is left of the file, types, alignment, and that
the tensors fill the file from the header to its end without overlaps or holes wider than the alignment. The header is
read front to back in pieces, and of arrays only those that the caller names are kept, so memory is bounded.

Does not: read tensor data, or know what a key means (`files.gguf.checkpoint` does).
Source: docs/gguf.md of ggml-org/ggml; tests compare with the gguf package.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.gguf.scan import Damaged, Scanner, Value
from qwq_mlx.files.gguf.types import TYPES, BlockType
from qwq_mlx.files.reading import open_to_read, read_at, recognise

__all__ = ["GgufHeader", "GgufTensor", "read_gguf_header", "read_gguf_header_by"]

_VERSIONS = (2, 3)
_MAX_KEYS = 10_000
_MAX_TENSORS = 40_000  # as for safetensors
_MAX_NAME = 256  # llama.cpp refuses 64 and more; other writers have longer ones
_MAX_DIMENSIONS = 4
_MAX_BYTES = 2**63 - 1
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_UNSIGNED_32 = 4  # a type of metadata
_AGAIN = "Fetch the file again."


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies: its bytes are file[start:end].

    shape: outermost axis first, as numpy and safetensors write it; the file has the reverse.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A checked header.

    data_start: position of the first tensor's bytes. metadata: every scalar and text, and the arrays asked for.
    array_lengths: of every array, kept or not. tensors: in the order of their data.
    """

    path: Path
    size_bytes: int
    version: int
    data_start: int
    metadata: Mapping[str, Value]
    array_lengths: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path, *, arrays: Container[str] = ()) -> GgufHeader:
    """Read and check the header of a GGUF file; reads no tensor data.

    arrays: keys of the arrays to keep. Raises SourceError naming the file, the position or tensor, what was found, what
    a good file has and what to do.
    """
    try:
        fd = open_to_read(path)
    except OSError as error:
        said = system_said(error, "Check that it exists and is readable.")
        raise SourceError(f"{path}: cannot be opened {said}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path}: is not a regular file, expected a GGUF file. {_AGAIN}")
        return read_gguf_header_by(
            lambda start, n_bytes: read_at(fd, n_bytes, start), path, status.st_size, arrays=arrays
        )
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Check the disk.')}") from error
    finally:
        os.close(fd)


def read_gguf_header_by(
    read: Callable[[int, int], bytes], path: Path, size_bytes: int, *, arrays: Container[str] = ()
) -> GgufHeader:
    """The same by read(start, n_bytes), which gives the file's bytes. path: for messages."""
    scanner = Scanner(read, size_bytes)
    try:
        version, n_tensors, n_keys = _preamble(scanner)
        metadata, lengths = _metadata(scanner, n_keys, arrays)
        alignment = _alignment(metadata)
        tensors = [_tensor(scanner, index) for index in range(n_tensors)]
        data_start = -(-scanner.position // alignment) * alignment
        return GgufHeader(
            path=path,
            size_bytes=size_bytes,
            version=version,
            data_start=data_start,
            metadata=metadata,
            array_lengths=lengths,
            tensors=_in_order(tensors, data_start=data_start, size_bytes=size_bytes, alignment=alignment),
        )
    except Damaged as error:
        raise SourceError(f"{path}: {error}. {_AGAIN}") from error


def _preamble(scanner: Scanner) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    first = scanner.peek(64)
    if first[:4] != b"GGUF":
        wrong = recognise(first)
        said = f"is {wrong}" if wrong else f"begins with {first[:4]!r}"
        raise Damaged(f"{said} ({scanner.size_bytes:,} bytes), expected a GGUF file, which begins with b'GGUF'")
    scanner.take(4, "the magic")
    version = scanner.u32("the version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise Damaged("is a GGUF file for big-endian machines, expected a little-endian one")
        raise Damaged(f"is of GGUF version {version:,}, expected {' or '.join(map(str, _VERSIONS))}")
    n_tensors, n_keys = scanner.u64("the number of tensors"), scanner.u64("the number of keys")
    for what, n, most in (("tensors", n_tensors, _MAX_TENSORS), ("keys", n_keys, _MAX_KEYS)):
        if n > most:
            raise Damaged(f"says that it has {n:,} {what}, expected at most {most:,}")
    return version, n_tensors, n_keys


def _metadata(scanner: Scanner, n_keys: int, arrays: Container[str]) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for index in range(n_keys):
        key = scanner.key(f"key {index + 1:,} of {n_keys:,}")
        if key in metadata or key in lengths:
            raise Damaged(f"has the key {key!r} twice, expected it once")
        if key == _ALIGNMENT_KEY and (kind := int.from_bytes(scanner.peek(4), "little")) != _UNSIGNED_32:
            raise Damaged(f"{key} is of type {kind:,}, expected {_UNSIGNED_32}, an unsigned number of 32 bits")
        value, length = scanner.value(key, keep_array=key in arrays)
        if length is not None:
            lengths[key] = length
        if value is not None:
            metadata[key] = value
    return metadata, lengths


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise Damaged(f"{_ALIGNMENT_KEY} is {alignment!r:.40}, expected a power of two up to {_MAX_ALIGNMENT:,}")
    return alignment


def _tensor(scanner: Scanner, index: int) -> GgufTensor:
    """One entry; start and end still count from the first tensor's byte."""
    name = scanner.text(f"the name of tensor {index + 1:,}", _MAX_NAME)
    where = f"tensor {name}"
    n_dimensions = scanner.u32(f"{where}: the number of dimensions")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise Damaged(f"{where}: has {n_dimensions:,} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    dimensions = [scanner.u64(f"{where}: its shape") for _ in range(n_dimensions)]
    number = scanner.u32(f"{where}: its type")
    offset = scanner.u64(f"{where}: its offset")
    block = TYPES.get(number)
    if block is None:
        names = ", ".join(each.name for each in TYPES.values())
        raise Damaged(f"{where}: is of type {number:,}, which is not known, expected one of {names}")
    shape = tuple(reversed(dimensions))
    if not all(shape) or math.prod(shape) * block.n_bytes > _MAX_BYTES or offset > _MAX_BYTES:
        raise Damaged(f"{where}: has the shape {shape} at offset {offset:,}, expected sizes from 1 that fit 64 bits")
    if shape[-1] % block.n_weights:
        raise Damaged(
            f"{where}: has rows of {shape[-1]:,} weights, expected a multiple of {block.n_weights}, the block of "
            f"{block.name}"
        )
    return GgufTensor(name, block, shape, offset, offset + math.prod(shape) // block.n_weights * block.n_bytes)


def _in_order(
    tensors: Iterable[GgufTensor], *, data_start: int, size_bytes: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors in the order of their data, with positions in the file."""
    ordered: dict[str, GgufTensor] = {}
    position, before = data_start, "the header"
    for each in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        start, end = data_start + each.start, data_start + each.end
        where = f"tensor {each.name}"
        if each.name in ordered:
            raise Damaged(f"{where}: is there twice, expected it once")
        if each.start % alignment:
            raise Damaged(f"{where}: begins at offset {each.start:,}, expected a multiple of {alignment}")
        if start < position:
            raise Damaged(f"{where}: its data overlap those of {before}")
        if start - position >= alignment:
            raise Damaged(f"{where}: the {start - position:,} bytes between it and {before} belong to no tensor")
        ordered[each.name] = GgufTensor(each.name, each.type, each.shape, start, end)
        position, before = end, where
    if size_bytes < position:
        raise Damaged(
            f"ends {position - size_bytes:,} bytes early: it has {size_bytes:,}, its header describes {position:,}. "
            "The download was cut off"
        )
    if size_bytes - position >= max(alignment, 2):
        raise Damaged(f"has {size_bytes - position:,} bytes after {before}, expected none")
    return ordered
