"""The JSON text of a safetensors header, read by a parser of its one form.

A header is an object of tensors, each with dtype, shape and data_offsets, and perhaps one object of texts. Nothing
else can be spoken: no nesting, no floats, no negative numbers, no field twice, no unknown field. So a hostile header
fails at its first wrong byte, and what is allocated stays under 10 times the header's length (a general JSON parser
takes 21 times for `[[],[],...]`, and keeps the last of two equal keys in silence).

Does not: know sub-byte types (F4, F6); no Qwen2 checkpoint has them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from qwq_mlx.errors import SourceError

__all__ = ["DTYPE_BYTES", "MAX_HEADER_BYTES", "METADATA", "TensorEntry", "parse_header"]

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

MAX_HEADER_BYTES = 100_000_000  # the reference's own limit
MAX_TENSORS = 40_000  # the largest conversion that the architecture allows; 500,000 empty ones cost mlx-lm 8 s
_MAX_STRING_BYTES = 65_536
_MAX_NAME = 512
_MAX_METADATA = 1_000
_MAX_DIMENSIONS = 8
_MAX_BYTES = 2**63 - 1
METADATA = "__metadata__"

_SPACE = re.compile(rb"[ \t\n\r]*")
_NUMBER = re.compile(rb"(?:0|[1-9][0-9]{0,18})(?![0-9.eE])")
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


def parse_header(raw: bytes, *, where: str, data_start: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors in the order they stand in, their positions counted from the start of the file, and the metadata.

    where: the file's path, for messages. data_start: position of the data section in the file.
    Each tensor's bytes fit its shape; whether the tensors fill the file is the caller's to check.
    Raises SourceError naming the tensor or the header's byte.
    """
    return _Parser(raw, where, data_start).header()


class _Parser:
    """Reads the one JSON form that a header can have; every step names the byte where it failed."""

    def __init__(self, raw: bytes, where: str, data_start: int) -> None:
        self._raw, self._where, self._data_start, self._at = raw, where, data_start, 0

    def header(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        """All tensors in the header's order, and the metadata."""
        if not self._raw.startswith(b"{"):
            self._fail("'{'")
        tensors: dict[str, TensorEntry] = {}
        metadata: dict[str, str] | None = None
        for name in self._members("a tensor's name"):
            if name in tensors or (name == METADATA and metadata is not None):
                raise SourceError(f"{self._where}: {name[:_MAX_NAME]!r} stands twice in the header. {_AGAIN}")
            if name == METADATA:
                metadata = self._metadata()
                continue
            if len(tensors) == MAX_TENSORS:
                raise SourceError(f"{self._where}: has more than {MAX_TENSORS:,} tensors. No model of this kind does.")
            if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
                raise SourceError(
                    f"{self._where}: tensor name {name[:_MAX_NAME]!r}: expected 1 to {_MAX_NAME} printable characters. "
                    + _AGAIN
                )
            tensors[name] = self._tensor(name)
        self._skip_space()
        if self._at != len(self._raw):
            self._fail("nothing but spaces after the last '}'")
        return tensors, metadata or {}

    def _metadata(self) -> dict[str, str]:
        values: dict[str, str] = {}
        for key in self._members("a metadata key"):
            if key in values:
                raise SourceError(f"{self._where}: metadata {key[:_MAX_NAME]!r} stands twice in the header. {_AGAIN}")
            if len(values) == _MAX_METADATA:
                raise SourceError(f"{self._where}: has more than {_MAX_METADATA:,} metadata entries. {_AGAIN}")
            values[key] = self._string("a metadata text")
        return values

    def _tensor(self, name: str) -> TensorEntry:
        where = f"{self._where}: tensor {name}"
        dtype: str | None = None
        shape: tuple[int, ...] | None = None
        offsets: tuple[int, ...] | None = None
        for field in self._members("dtype, shape or data_offsets"):
            if field == "dtype" and dtype is None:
                dtype = self._string("a dtype")
            elif field == "shape" and shape is None:
                shape = self._numbers(where, "shape", _MAX_DIMENSIONS)
            elif field == "data_offsets" and offsets is None:
                offsets = self._numbers(where, "data_offsets", 2)
            else:
                fault = " twice" if field in ("dtype", "shape", "data_offsets") else ", a field that safetensors lacks"
                raise SourceError(f"{where}: has {field[:_MAX_NAME]!r}{fault}. {_AGAIN}")
        if dtype is None or shape is None or offsets is None:
            found = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            missing = ", ".join(field for field, value in found.items() if value is None)
            raise SourceError(f"{where}: has no {missing}. {_AGAIN}")
        width = DTYPE_BYTES.get(dtype)
        if width is None:
            raise SourceError(f"{where}: dtype is {dtype[:_MAX_NAME]!r}, expected one of {', '.join(DTYPE_BYTES)}.")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise SourceError(f"{where}: data_offsets are {list(offsets)}, expected [begin, end]. {_AGAIN}")
        if math.prod(filter(None, shape)) * width > _MAX_BYTES:
            raise SourceError(f"{where}: shape {list(shape)} overflows 64 bits. {_AGAIN}")
        n_bytes = math.prod(shape) * width
        if offsets[1] - offsets[0] != n_bytes:
            raise SourceError(
                f"{where}: has {offsets[1] - offsets[0]:,} bytes, but {dtype} {list(shape)} needs {n_bytes:,}. {_AGAIN}"
            )
        return TensorEntry(name, dtype, shape, self._data_start + offsets[0], self._data_start + offsets[1])

    def _members(self, what: str) -> Iterator[str]:
        """The keys of an object; the caller reads each value before it asks for the next key."""
        self._expect(b"{")
        self._skip_space()
        if self._raw.startswith(b"}", self._at):
            self._at += 1
            return
        while True:
            key = self._string(what)
            self._expect(b":")
            yield key
            self._skip_space()
            if self._raw.startswith(b"}", self._at):
                self._at += 1
                return
            self._expect(b",")

    def _numbers(self, where: str, what: str, n_most: int) -> tuple[int, ...]:
        self._expect(b"[")
        values: list[int] = []
        self._skip_space()
        if self._raw.startswith(b"]", self._at):
            self._at += 1
            return ()
        while True:
            self._skip_space()
            match = _NUMBER.match(self._raw, self._at)
            if match is None:
                found = self._raw[self._at : self._at + 24].decode("latin-1")
                raise SourceError(
                    f"{where}: {what} has {found!r}, expected whole numbers from 0 to 10^19 - 1. {_AGAIN}"
                )
            if len(values) == n_most:
                raise SourceError(f"{where}: {what} has more than {n_most} numbers. {_AGAIN}")
            values.append(int(match[0]))
            self._at = match.end()
            self._skip_space()
            if self._raw.startswith(b"]", self._at):
                self._at += 1
                return tuple(values)
            self._expect(b",")

    def _string(self, what: str) -> str:
        self._skip_space()
        if not self._raw.startswith(b'"', self._at):
            self._fail(what)
        end = self._closing_quote(self._at + 1)
        try:
            text = str(json.loads(self._raw[self._at : end].decode("utf-8")))
            text.encode("utf-8")  # JSON can spell half a surrogate pair, UTF-8 cannot
        except ValueError as error:
            raise SourceError(
                f"{self._where}: {what} at header byte {self._at:,} is not UTF-8 JSON text ({error}). {_AGAIN}"
            ) from error
        self._at = end
        return text

    def _closing_quote(self, start: int) -> int:
        """The position behind the string that begins at start; a regex would need 64 bytes for each escape."""
        end = start
        while True:
            end = self._raw.find(b'"', end, start + _MAX_STRING_BYTES)
            if end < 0:
                raise SourceError(
                    f"{self._where}: the text at header byte {self._at:,} does not end within {_MAX_STRING_BYTES:,} "
                    f"bytes. {_AGAIN}"
                )
            n_backslashes = 0
            while self._raw[end - 1 - n_backslashes] == ord("\\"):
                n_backslashes += 1
            end += 1
            if n_backslashes % 2 == 0:
                return end

    def _expect(self, mark: bytes) -> None:
        self._skip_space()
        if not self._raw.startswith(mark, self._at):
            self._fail(repr(mark.decode()))
        self._at += 1

    def _skip_space(self) -> None:
        match = _SPACE.match(self._raw, self._at)
        self._at = match.end() if match else self._at

    def _fail(self, expected: str) -> NoReturn:
        found = self._raw[self._at : self._at + 24].decode("latin-1")
        found = repr(found) if found else "its end"
        raise SourceError(
            f"{self._where}: header byte {self._at:,} is {found}, expected {expected}. "
            f"The header is not safetensors JSON; the file is damaged. {_AGAIN}"
        )
