"""Which tensors are safely on disk, so that a second run repeats at most the one that was being written.

The journal is a text file of one JSON object a line. The first line describes the conversion (source, recipe,
versions); each further line is one finished tensor, written and synced only after the tensor's own bytes were synced.
So whatever line can be read is true. A torn last line, which a power cut leaves, is dropped.

Does not: hold weights, or say anything about files that are written after the last tensor.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import ConversionError, SourceError
from qwq_mlx.files.atomic import fsync_file
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.json_object import parse_json_object

__all__ = ["FinishedTensor", "Journal", "differences", "read_description"]

_EDITED = "The journal was edited. `restart=True` throws the unfinished conversion away and begins again."


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTensor:
    """One finished tensor.

    name: of the source tensor. sha256: of each output's bytes, in the plan's order. source_sha256: of the source shard
    from its start to the end of this tensor, so a resumed run can tell whether the shard is still the same;
    source_ctime_ns: when that file was last changed, by the clock that utime and cp -p cannot set back.
    error2, weight2: sums of squares (error2 is 0 for a copied tensor). zero_pages: see `quant.rounding_error`.
    """

    name: str
    sha256: tuple[str, ...]
    source_sha256: str
    source_ctime_ns: int
    error2: float
    weight2: float
    zero_pages: int


def read_description(path: Path) -> dict[str, Any]:
    """A journal's first line, or an empty one where there is none that can be read."""
    try:
        lines, _ = _read(path)
    except (OSError, SourceError):
        return {}
    return lines[0] if lines else {}


class Journal:
    """The journal of one conversion, opened for appending. Use `Journal.create` or `Journal.resume`."""

    def __init__(self, path: Path, finished: dict[str, FinishedTensor], n_bytes: int) -> None:
        self.finished = finished
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.ftruncate(self._fd, n_bytes)
        os.lseek(self._fd, n_bytes, os.SEEK_SET)

    @classmethod
    def create(cls, path: Path, description: Mapping[str, Any]) -> Journal:
        """Start a journal; its first line is durable when this returns (its folder entry is the caller's to sync)."""
        line = _encode(description)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write(fd, line)
            fsync_file(fd)
        finally:
            os.close(fd)
        return cls(path, {}, len(line))

    @classmethod
    def resume(cls, path: Path, description: Mapping[str, Any]) -> Journal | None:
        """Continue a journal; None where its first line never became durable (nothing was done then).

        Raises ConversionError if it belongs to another source, recipe or version, naming each difference, and for a
        line that this package does not write; SourceError for one that is no JSON.
        """
        lines, n_bytes = _read(path)
        if not lines:
            return None
        if differing := differences(lines[0], description):
            raise ConversionError(
                f"{path.parent}: holds an unfinished conversion of something else:\n"
                + "\n".join(f"  {each}" for each in differing)
                + "\nGive the same source and recipe to finish it, or `restart=True` to throw it away and begin again."
            )
        try:
            tensors = [from_json_value(line, FinishedTensor, where=f"line {n}") for n, line in enumerate(lines[1:], 2)]
        except FieldError as error:
            raise ConversionError(f"{path}: {error}. {_EDITED}") from error
        return cls(path, {tensor.name: tensor for tensor in tensors}, n_bytes)

    def append(self, tensor: FinishedTensor) -> None:
        """Record a tensor whose bytes are durable; durable itself when this returns."""
        _write(self._fd, _encode(asdict(tensor)))
        fsync_file(self._fd)
        self.finished[tensor.name] = tensor

    def close(self) -> None:
        """Close the file; what was appended stays."""
        os.close(self._fd)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each field that differs between two descriptions, as `name: was X, is Y`."""
    lines = []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: was {_short(old)}, is {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _encode(value: Mapping[str, Any]) -> bytes:
    """One line; its checksum stands before it, so a torn or flipped line is seen."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The good lines from the start, and how many bytes they take.

    Raises SourceError for a line whose checksum fits but which is no JSON object: somebody wrote it by hand.
    """
    data = path.read_bytes()
    lines: list[dict[str, Any]] = []
    position = 0
    while (end := data.find(b"\n", position)) >= 0:
        checksum, _, text = data[position:end].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            break
        lines.append(parse_json_object(text, what=f"{path}: line {len(lines) + 1}", advice=_EDITED))
        position = end + 1
    return lines, position


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
