"""Every damaged or malicious safetensors file that we know, and the message it gets."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import safetensors_bytes

from qwq_mlx.errors import SourceError
from qwq_mlx.files.header import MAX_TENSORS, read_header, read_header_by

GOOD = safetensors_bytes({"a": ("BF16", (2, 3), bytes(12)), "b": ("U8", (4,), bytes(4))}, {"format": "pt"})
DATA = GOOD[-16:]


def spoken(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = '"U8"', shape: str = "[4]", offsets: str = "[0,4]", more: str = "") -> bytes:
    """A file of one tensor t with 4 bytes, its fields spelled as given."""
    return spoken(f'{{"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}', bytes(4))


def two(first: tuple[int, int], second: tuple[int, int], n_data: int) -> bytes:
    """Two U8 tensors at these offsets in n_data bytes."""
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in {"a": first, "b": second}.items()
    }
    return spoken(json.dumps(header), bytes(n_data))


CASES: dict[str, tuple[bytes, str]] = {
    # files that are something else
    "empty file": (b"", "has 0 bytes, expected at least 8 of a safetensors file"),
    "seven bytes": (b"\x10" + bytes(6), "has 7 bytes, expected at least 8"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3900000000\n",
        r"is a git-lfs pointer, not the file it points to \(73 bytes\), expected a safetensors file",
    ),
    "HTML page": (b"\n<!DOCTYPE html><html>503</html>", "is an HTML page"),
    "HTML page without doctype": (b"<HTML><body>", "is an HTML page"),
    "XML error": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is an XML page"),
    "JSON error": (b'{"error":"Repository not found"}', "is a JSON error message"),
    "PyTorch archive": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "is a zip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(50), "is a GGUF file"),
    "zeros": (bytes(4096), "header's length is 0, expected 2 to 8,388,608 bytes"),
    # the length
    "length 0": (struct.pack("<Q", 0) + GOOD[8:], "header's length is 0"),
    "length 1": (struct.pack("<Q", 1) + b"{" + DATA, "header's length is 1, expected 2 to 8,388,608"),
    "length 2^63": (struct.pack("<Q", 2**63) + GOOD[8:], "header's length is 9,223,372,036,854,775,808"),
    "length all ones": (b"\xff" * 8 + GOOD[8:], "header's length is 18,446,744,073,709,551,615"),
    "length 8 MiB and 1": (struct.pack("<Q", 8_388_609) + GOOD[8:], "header's length is 8,388,609"),
    "length beyond the file": (
        struct.pack("<Q", 8_000_000) + GOOD[8:],
        "the header has 8,000,000 bytes, but the file ends",
    ),
    "length one too long": (struct.pack("<Q", len(GOOD) - 7) + GOOD[8:], "but the file ends after"),
    "length one too short": (
        struct.pack("<Q", len(GOOD) - 25) + GOOD[8:],
        "has 1 byte after the last tensor, expected none",
    ),
    "length into the data": (
        struct.pack("<Q", len(GOOD) - 10) + GOOD[8:],
        r"the header is not JSON \(Extra data: line 1 column \d+",
    ),
    "truncated in the header": (GOOD[:40], "but the file ends after 32 of them"),
    # the JSON
    "not JSON": (
        spoken("PICKLE!!", b""),
        r"the header begins with b'PICKLE!!', expected '{'\. The file is damaged",
    ),
    "a list": (spoken("[1,2,3]"), r"header begins with b'\[1,2,3\]', expected '{'"),
    "a text": (spoken('"abc"'), r"header begins with b'\"abc\"', expected '{'"),
    "leading space": (spoken(" {}"), "header begins with b' {}', expected '{'"),
    "byte order mark": (spoken(b"\xef\xbb\xbf{}"), r"header begins with b'\\xef\\xbb\\xbf{}', expected '{'"),
    "deep lists": (spoken('{"t":' + "[" * 100_000), r"the header is not JSON \(maximum recursion depth exceeded"),
    "deep objects": (spoken('{"a":' * 100_000), r"the header is not JSON \(maximum recursion depth exceeded"),
    "open object": (spoken('{"t":{"dtype":"U8"'), "not JSON .Expecting ',' delimiter"),
    "trailing comma": (spoken('{"t":{"dtype":"U8",}}'), "not JSON .Expecting property name|Illegal trailing comma"),
    "single quotes": (spoken("{'t':{}}"), "not JSON .Expecting property name"),
    "comment": (spoken('{/*x*/"t":{}}'), "not JSON .Expecting property name"),
    "NUL after the object": (spoken("{}\x00\x00"), "not JSON .Extra data"),
    "second object": (spoken("{}{}"), "not JSON .Extra data"),
    "name never ends": (spoken('{"' + "x" * 100_000), "not JSON .Unterminated string"),
    "name not UTF-8": (spoken(b'{"\xff":{}}'), "the header is not UTF-8 at byte 2"),
    "half a surrogate pair": (
        spoken('{"\\ud800":{}}'),
        r"the header holds the lone surrogate U\+D800, which is no text",
    ),
    "raw newline in a name": (spoken('{"a\nb":{}}'), "not JSON .Invalid control character"),
    "bad escape": (spoken('{"\\x41":{}}'), r"not JSON .Invalid \\escape"),
    # names
    "same tensor twice": (
        spoken(
            '{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0074":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        r"the header is not JSON \(key 't' stands twice\)",
    ),
    "metadata twice": (spoken('{"__metadata__":{},"__metadata__":{}}'), "key '__metadata__' stands twice"),
    "metadata key twice": (spoken('{"__metadata__":{"k":"a","k":"b"}}'), "key 'k' stands twice"),
    "metadata not texts": (
        spoken('{"__metadata__":{"k":1}}'),
        r"__metadata__ is {'k': 1}, expected an object of texts",
    ),
    "metadata is a list": (spoken('{"__metadata__":[]}'), r"__metadata__ is \[\], expected an object of texts"),
    "half a surrogate pair in the metadata": (
        spoken('{"__metadata__":{"k":"\\ud800"}}'),
        r"the header holds the lone surrogate U\+D800, which is no text",
    ),
    "empty name": (
        spoken('{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "tensor name '': expected 1 to 512 printable",
    ),
    "name with a terminal escape": (
        spoken('{"\\u001b[2J":{}}'),
        r"tensor name '\\x1b\[2J': expected 1 to 512 printable",
    ),
    "name of 513 characters": (spoken('{"' + "x" * 513 + '":{}}'), "expected 1 to 512 printable characters"),
    "too many tensors": (
        spoken(
            "{"
            + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(MAX_TENSORS + 1))
            + "}"
        ),
        "has 40,001 tensors, expected at most 40,000",
    ),
    # fields
    "tensor is null": (
        spoken('{"t":null}'),
        "tensor t: has None, expected dtype, shape, data_offsets and nothing else",
    ),
    "tensor without fields": (
        spoken('{"t":{}}'),
        r"tensor t: has \[\], expected dtype, shape, data_offsets and nothing else",
    ),
    "no dtype": (
        spoken('{"t":{"shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        r"tensor t: has \['shape', 'data_offsets'\], expected dtype",
    ),
    "no shape": (
        spoken('{"t":{"dtype":"U8","data_offsets":[0,4]}}', bytes(4)),
        r"tensor t: has \['dtype', 'data_offsets'\], expected dtype",
    ),
    "no offsets": (
        spoken('{"t":{"dtype":"U8","shape":[4]}}', bytes(4)),
        r"tensor t: has \['dtype', 'shape'\], expected dtype",
    ),
    "field twice": (entry(more=',"dtype":"I8"'), "key 'dtype' stands twice"),
    "unknown field": (
        entry(more=',"strides":[1]'),
        "tensor t: has .*'strides'.*, expected dtype, shape, data_offsets and nothing else",
    ),
    "dtype unknown": (entry('"Q4_K"'), "tensor t: dtype is 'Q4_K', expected one of BOOL, U8"),
    "dtype sub-byte": (entry('"F4"', "[8]"), "tensor t: dtype is 'F4', expected one of"),
    "dtype lower case": (entry('"u8"'), "tensor t: dtype is 'u8'"),
    "dtype a number": (entry("8"), "tensor t: dtype is 8, expected one of BOOL"),
    "dtype too wide for the bytes": (entry('"F32"'), r"tensor t: has 4 bytes, but F32 \[4\] needs 16"),
    "dtype too narrow": (entry('"U8"', "[2]"), r"tensor t: has 4 bytes, but U8 \[2\] needs 2"),
    "shape not a list": (entry(shape="4"), "tensor t: shape is 4, expected at most 8 whole numbers from 0"),
    "shape of floats": (entry(shape="[4.0]"), r"tensor t: shape is \[4\.0\], expected"),
    "shape with exponent": (entry(shape="[4e0]"), r"tensor t: shape is \[4\.0\], expected"),
    "shape negative": (entry(shape="[-2,-2]"), r"tensor t: shape is \[-2\.0, -2\.0\], expected"),
    "shape minus zero": (entry(shape="[-0]", offsets="[0,0]"), r"tensor t: shape is \[-0\.0\], expected"),
    "shape of texts": (entry(shape='["4"]'), r"tensor t: shape is \['4'\], expected"),
    "shape with a leading zero": (entry(shape="[04]"), "not JSON .Expecting ',' delimiter"),
    "shape of true": (entry(shape="[true]"), r"tensor t: shape is \[True\], expected"),
    "shape NaN": (entry(shape="[NaN]"), "not JSON .NaN is no JSON number"),
    "shape with a hole": (entry(shape="[,4]"), "not JSON .Expecting value"),
    "shape nested": (entry(shape="[[4]]"), r"tensor t: shape is \[\[4\]\], expected"),
    "shape of 20 digits": (
        entry(shape="[18446744073709551620]"),
        r"tensor t: shape is \[1\.8446744073709552e\+19\], expected",
    ),
    "shape wraps 64 bits": (
        entry(shape="[4294967296,4294967296,4]"),
        r"shape \[4294967296, 4294967296, 4\] overflows 64 bits",
    ),
    "shape overflows beside a zero": (entry(shape="[9223372036854775807,2,0]", offsets="[0,0]"), "overflows 64 bits"),
    "shape of nine dimensions": (
        entry(shape="[1,1,1,1,1,1,1,1,4]"),
        r"tensor t: shape is \[1, 1, 1, 1, 1, 1, \.\.\.\], expected at most 8",
    ),
    "offsets negative": (entry(offsets="[-4,0]"), r"tensor t: data_offsets are \[-4\.0, 0\], expected \[begin, end\]"),
    "offsets that wrap 64 bits": (
        entry(offsets="[18446744073709551612,18446744073709551616]"),
        r"tensor t: data_offsets are \[1\.8446744073709552e\+19, ",
    ),
    "offsets at the end of 64 bits": (entry(offsets="[9223372036854775804,9223372036854775808]"), "tensor t: "),
    "offsets reversed": (entry(offsets="[4,0]"), r"tensor t: data_offsets are \[4, 0\], expected \[begin, end\]"),
    "offsets of one number": (entry(offsets="[4]"), r"tensor t: data_offsets are \[4\]"),
    "offsets of three numbers": (entry(offsets="[0,4,8]"), r"tensor t: data_offsets are \[0, 4, 8\], expected"),
    "offsets empty": (entry(offsets="[]"), r"tensor t: data_offsets are \[\]"),
    "offsets float": (entry(offsets="[0.0,4.0]"), r"tensor t: data_offsets are \[0\.0, 4\.0\], expected"),
    "offsets too short": (entry(offsets="[0,3]"), r"tensor t: has 3 bytes, but U8 \[4\] needs 4"),
    # the data section
    "offsets beyond the file": (two((0, 4), (4, 999_999), 8), "ends 999,991 bytes early"),
    "offsets at 2^62": (
        two((0, 4), (2**62, 2**62 + 4), 8),
        "tensor b: the 4,611,686,018,427,387,900 bytes between it and tensor a",
    ),
    "shared bytes": (two((0, 4), (0, 4), 4), "tensor b: its data overlap those of tensor a"),
    "overlap": (two((0, 4), (3, 8), 8), "tensor b: its data overlap those of tensor a"),
    "hole": (two((0, 4), (5, 8), 8), "tensor b: the 1 byte between it and tensor a belong to no tensor"),
    "hole before the first": (
        two((2, 4), (4, 8), 8),
        "tensor a: the 2 bytes between it and the header belong to no tensor",
    ),
    "trailing byte": (GOOD + b"\x00", "has 1 byte after the last tensor, expected none"),
    "two files joined": (GOOD + GOOD, "bytes after the last tensor, expected none"),
    "truncated by a byte": (GOOD[:-1], "ends 1 byte early: has .* bytes, its header describes .*The file is truncated"),
    "truncated by half": (GOOD[: len(GOOD) - 8], "ends 8 bytes early"),
    "header without data": (GOOD[:-16], "ends 16 bytes early"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, expected = CASES[case]
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=expected) as error:
        read_header(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(("Fetch the file again.", "Qwen2 model, and fetch it again."))
    assert len(message) < 2_000
    assert re.search(r"[\x00-\x1f\x7f-\x9f]", message) is None


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "is a folder, expected a safetensors file"),
    "FIFO": (os.mkfifo, "is a FIFO, expected a safetensors file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a safetensors file"),
    "nothing": (lambda path: None, r"cannot be opened \(No such file or directory\). Check that it exists"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "cannot be opened"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be opened"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, place: str) -> None:
    make, expected = PLACES[place]
    path = tmp_path / "s.safetensors"
    make(path)
    with pytest.raises(SourceError, match=expected):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    def read(start: int, n_bytes: int) -> bytes:
        return GOOD[start : start + n_bytes] if start == 0 else b"{"

    with pytest.raises(SourceError, match=r"s: read 1 of 1\d\d header bytes; the file changed meanwhile"):
        read_header_by(read, Path("s"), len(GOOD))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's whole path may have 104 bytes on macOS
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.safetensors")
        with pytest.raises(SourceError, match=r"cannot be opened|is a socket"):
            read_header(tmp_path / "s.safetensors")
