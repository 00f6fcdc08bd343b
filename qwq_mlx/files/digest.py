"""sha256 of files, of JSON values, and of a shard's header and tensors in the same pass.

Does not: compare digests with anything (`manifest` does).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.header import Header
from qwq_mlx.files.reading import open_to_read

__all__ = ["ByteProgress", "ShardDigest", "sha256_file", "sha256_header", "sha256_json", "sha256_shard"]

ByteProgress = Callable[[int], object]  # called with the number of bytes done since the last call

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """sha256 (hex) of a whole shard, of its first bytes up to the data, and of each tensor's bytes by name."""

    file: str
    header: str
    tensors: Mapping[str, str]


def sha256_file(path: Path, progress: ByteProgress | None = None) -> str:
    """sha256 of a file's bytes, as 64 hex digits. Raises SourceError when it cannot be read."""
    digest = hashlib.sha256()
    with _Reader(path) as reader:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


_SORTED = json.JSONEncoder(sort_keys=True)


def sha256_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys: what a file says of itself.

    >>> sha256_json({"b": 1, "a": [2]}) == sha256_json({"a": [2], "b": 1})
    True
    """
    return hashlib.sha256(_SORTED.encode(value).encode()).hexdigest()


def sha256_header(header: Header) -> str:
    """sha256 of a shard's length and header JSON. Raises SourceError when the file cannot be read."""
    with _Reader(header.path) as reader:
        return hashlib.sha256(reader.read(header.data_start)).hexdigest()


def sha256_shard(header: Header, progress: ByteProgress | None = None) -> ShardDigest:
    """Digests of a shard, its header and each tensor, reading the file once; file and tensor are hashed side by side.

    Raises SourceError when it cannot be read or ends before its header says.
    """
    whole = hashlib.sha256()
    tensors = {}
    with _Reader(header.path) as reader, ThreadPoolExecutor(1) as beside:
        first = reader.read(header.data_start)
        whole.update(first)
        if progress is not None:
            progress(len(first))
        for name, entry in header.tensors.items():
            one = hashlib.sha256()
            n_left = entry.end - entry.start
            while n_left:
                block = reader.read(min(n_left, _BLOCK_BYTES))
                if not block:
                    raise SourceError(f"{header.path}: ended inside tensor {name} while it was read. Make it again.")
                other = beside.submit(one.update, block)
                whole.update(block)
                other.result()
                n_left -= len(block)
                if progress is not None:
                    progress(len(block))
            tensors[name] = one.hexdigest()
    return ShardDigest(file=whole.hexdigest(), header=hashlib.sha256(first).hexdigest(), tensors=tensors)


class _Reader:
    """A file read in order, with the operating system's errors turned into ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> _Reader:
        try:
            self._fd = open_to_read(self._path)
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be opened {system_said(error, 'Check the folder.')}") from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, n_bytes: int) -> bytes:
        """The next n_bytes, fewer only at the end of the file."""
        parts: list[bytes] = []
        try:
            while n_bytes and (part := os.read(self._fd, n_bytes)):
                parts.append(part)
                n_bytes -= len(part)
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be read {system_said(error, 'Check the disk.')}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)
