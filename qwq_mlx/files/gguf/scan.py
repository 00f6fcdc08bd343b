"""The values of a GGUF header, one after another, from a file of which a piece at a time is in memory.

Does not: know the order of a file's parts (`files.gguf.header` does).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

__all__ = ["MAX_HEADER_BYTES", "Damaged", "Scanner", "Value"]

Value = int | float | bool | str | list[str] | list[int] | list[float] | list[bool]

MAX_HEADER_BYTES = 64 << 20
"""Qwen2's header has 6 MB: its vocabulary and merges."""

MAX_ELEMENTS = 1 << 20  # of an array that is kept; Qwen2's vocabulary has 152,064
_MAX_KEY = 256
_MAX_TEXT = 1 << 20  # a chat template is the longest text
_MAX_TOKEN = 1 << 12  # bytes of a text in an array
_PIECE = 1 << 18
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL = 7


class Damaged(Exception):  # noqa: N818 - the end of a sentence; `files.gguf.header` makes the error of it
    """What is wrong with a header, as words behind the file's name."""


class Scanner:
    """Reads forward. size_bytes: of the whole file."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read = read
        self.size_bytes = size_bytes
        self._piece = b""
        self._piece_start = 0
        self.position = 0

    def peek(self, n_bytes: int) -> bytes:
        """The next bytes, fewer at the end of the file; the position stays."""
        self._fill(n_bytes)
        at = self.position - self._piece_start
        return self._piece[at : at + n_bytes]

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next bytes. what: they are, for messages."""
        at = self.position - self._piece_start
        if at + n_bytes > len(self._piece):
            if n_bytes > self.size_bytes - self.position:
                raise Damaged(
                    f"{what}: needs {n_bytes:,} bytes at byte {self.position:,}, but the file ends after "
                    f"{self.size_bytes:,}. The download was cut off, or the file is damaged"
                )
            if self.position + n_bytes > MAX_HEADER_BYTES:
                raise Damaged(f"{what}: the header goes on after {MAX_HEADER_BYTES:,} bytes, expected it to end before")
            self._fill(n_bytes)
            at = 0
            if len(self._piece) < n_bytes:
                raise Damaged(f"{what}: cannot be read at byte {self.position:,}; the file changed meanwhile")
        self.position += n_bytes
        return self._piece[at : at + n_bytes]

    def _fill(self, n_bytes: int) -> None:
        at = self.position - self._piece_start
        if at + n_bytes > len(self._piece):
            wanted = min(max(n_bytes, _PIECE), self.size_bytes - self.position)
            piece = self._read(self.position, wanted)
            while len(piece) < wanted and (more := self._read(self.position + len(piece), wanted - len(piece))):
                piece += more
            self._piece, self._piece_start = piece, self.position

    def u32(self, what: str) -> int:
        """An unsigned number of 32 bits."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """An unsigned number of 64 bits."""
        return int.from_bytes(self.take(8, what), "little")

    def key(self, what: str) -> str:
        """A key of the metadata, printable."""
        return self.text(what, _MAX_KEY)

    def text(self, what: str, most: int) -> str:
        """A printable text of 1 to `most` bytes: a name."""
        text = self._string(what, most)
        if not text or not text.isprintable():
            raise Damaged(f"{what} is {text[:80]!r}, expected 1 to {most} printable characters")
        return text

    def _string(self, what: str, most: int) -> str:
        n_bytes = self.u64(what)
        if n_bytes > most:
            raise Damaged(f"{what} has {n_bytes:,} bytes, expected at most {most:,}")
        raw = self.take(n_bytes, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Damaged(f"{what} is not UTF-8 (byte {error.start:,} of {raw[:40]!r})") from error

    def value(self, key: str, *, keep_array: bool) -> tuple[Value | None, int | None]:
        """The value of a key, and its length where it is an array; an array that is not kept is None."""
        kind = self.u32(f"the type of {key}")
        if kind == _STRING:
            return self._string(key, _MAX_TEXT), None
        if kind != _ARRAY:
            return self._number(kind, key), None
        inner = self.u32(f"the type of {key}'s elements")
        if inner == _ARRAY:
            raise Damaged(f"{key} is an array of arrays, expected one of numbers or texts")
        length = self.u64(f"the length of {key}")
        width = 8 if inner == _STRING else struct.calcsize(self._code(inner, key))  # a text has its length at least
        if length > (self.size_bytes - self.position) // width:
            raise Damaged(f"{key} has {length:,} elements, more than the file has bytes for")
        if length > MAX_ELEMENTS:
            raise Damaged(f"{key} has {length:,} elements, expected at most {MAX_ELEMENTS:,}")
        if inner == _STRING:
            return self._strings(key, length, keep=keep_array), length
        return self._numbers(key, inner, length, keep=keep_array), length

    def _code(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise Damaged(f"{key} is of type {kind:,}, expected one of 0 to 12")
        return f"<{_NUMBERS[kind]}"

    def _number(self, kind: int, key: str) -> int | float | bool:
        code = self._code(kind, key)
        raw = self.take(struct.calcsize(code), key)
        self._check_bools(kind, raw, key)
        number: int | float | bool = struct.unpack(code, raw)[0]
        return number

    def _check_bools(self, kind: int, raw: bytes, key: str) -> None:
        if kind == _BOOL and raw.strip(b"\0\1"):
            raise Damaged(f"{key} is true or false, but has a byte of {raw.strip(bytes(2))[0]}")

    def _strings(self, key: str, length: int, *, keep: bool) -> list[str] | None:
        texts: list[str] | None = [] if keep else None
        for index in range(length):
            n_bytes = int.from_bytes(self.take(8, key), "little")
            if n_bytes > _MAX_TOKEN:
                raise Damaged(f"{key}: text {index:,} has {n_bytes:,} bytes, expected at most {_MAX_TOKEN:,}")
            raw = self.take(n_bytes, key)
            if texts is not None:
                try:
                    texts.append(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise Damaged(f"{key}: text {index:,} is not UTF-8 ({raw[:40]!r})") from error
        return texts

    def _numbers(self, key: str, kind: int, length: int, *, keep: bool) -> list[int] | list[float] | list[bool] | None:
        code = self._code(kind, key)[1:]
        width = struct.calcsize(f"<{code}")
        numbers: list[int] = []
        for first in range(0, length, _PIECE // 8):
            n = min(_PIECE // 8, length - first)
            raw = self.take(n * width, key)
            self._check_bools(kind, raw, key)
            if keep:
                numbers.extend(struct.unpack(f"<{n}{code}", raw))
        return numbers if keep else None
