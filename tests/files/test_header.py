"""The header reader: right on good files, stricter than the reference on every other, small whatever it is given."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checkpoints import safetensors_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from qwq_mlx.errors import SourceError
from qwq_mlx.files.header import DTYPE_BYTES, TensorEntry, place_tensors, read_header

GOOD = safetensors_bytes(
    {
        "a.weight": ("BF16", (2, 3), bytes(range(12))),
        "b\u00fc\U0001f600": ("F32", (1,), b"\x00\x00\x80\x3f"),
        "empty": ("U8", (0, 7), b""),
        "scalar": ("I64", (), bytes(8)),
    },
    {"format": "pt"},
)


def with_json(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def accepts(content: bytes, folder: Path) -> bool:
    """Whether our reader takes it; anything but SourceError is a failure of the test."""
    path = folder / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except SourceError as error:
        assert str(path) in str(error)
        return False
    return True


def reference_accepts(content: bytes) -> bool:
    try:
        deserialize(content)
    except (SafetensorError, ValueError):
        return False
    return True


def test_it_reads_names_types_shapes_and_positions(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    start = len(GOOD) - 24
    assert header.path == path
    assert header.size_bytes == len(GOOD)
    assert header.data_start == start
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors.values()) == [
        TensorEntry("a.weight", "BF16", (2, 3), start, start + 12),
        TensorEntry("b\u00fc\U0001f600", "F32", (1,), start + 12, start + 16),
        TensorEntry("empty", "U8", (0, 7), start + 16, start + 16),
        TensorEntry("scalar", "I64", (), start + 16, start + 24),
    ]


def test_it_reads_what_the_reference_writes(tmp_path: Path) -> None:
    arrays = {
        f"t{width}.{name}": np.zeros((3, width), name) for width in (1, 2, 5) for name in ("f2", "f4", "i8", "u4")
    }
    path = tmp_path / "reference.safetensors"
    save_file(arrays, path, metadata={"quote": 'a "b" \\ \n', "format": "np"})
    header = read_header(path)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {k: v.shape for k, v in arrays.items()}
    assert header.metadata == {"quote": 'a "b" \\ \n', "format": "np"}
    assert [entry.start for entry in header.tensors.values()] == sorted(e.start for e in header.tensors.values())


def test_fields_and_tensors_may_come_in_any_order_with_any_spaces(tmp_path: Path) -> None:
    first = '"b" :\t{"data_offsets":[2,4],\n"shape":[ 2 ],"dtype":"U8"}'
    text = "{ " + first + ' , "a":{"shape":[2],"dtype":"U8","data_offsets":[0,2]}\r}  '
    path = tmp_path / "spaced.safetensors"
    path.write_bytes(with_json(text, b"abcd"))
    assert list(read_header(path).tensors) == ["a", "b"]
    assert reference_accepts(path.read_bytes())


def test_a_written_header_is_read_by_the_reference_and_by_us(tmp_path: Path) -> None:
    specs = [("x", "BF16", (4, 8)), ("y", "U32", (3,)), ("z \u20ac", "F32", ())]
    head, entries = place_tensors(specs, {"format": "mlx"})
    assert len(head) % 8 == 0
    assert [(e.name, e.dtype, e.shape) for e in entries] == specs
    assert entries[0].start == len(head)
    content = head + bytes(entries[-1].end - len(head))
    path = tmp_path / "own.safetensors"
    path.write_bytes(content)
    assert tuple(read_header(path).tensors.values()) == entries
    assert sorted((name, info["dtype"], tuple(info["shape"])) for name, info in deserialize(content)) == specs
    assert place_tensors([]) == (with_json("{}      "), ())


def test_a_written_header_is_these_bytes() -> None:
    text = b'{"__metadata__":{"k":"v"},"t":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    assert place_tensors([("t", "BF16", (2,))], {"k": "v"})[0] == b"\x50" + bytes(7) + text
    assert len(text) == 0x50


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_the_reference_agrees_on_every_types_width(tmp_path: Path, dtype: str) -> None:
    head, entries = place_tensors([("t", dtype, (3,))])
    assert accepts(head + bytes(entries[0].end - entries[0].start), tmp_path)
    assert reference_accepts(head + bytes(entries[0].end - entries[0].start))


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 25), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_end_in_a_source_error_or_in_what_the_reference_accepts_too(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD)
    for position, value in flips:
        content[position] = value
    if accepts(bytes(content), tmp_path):
        assert reference_accepts(bytes(content))


ODD = [
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "1e0",
    "2.0",
    "01",
    "18446744073709551616",
    "9" * 40,
    "null",
    "true",
    '"2"',
    "[]",
    "{}",
]
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(['"U8"', '"BF16"', '"u8"', '"F4"', "7", "null", '"\\ud800"']),
        "shape": st.lists(st.sampled_from(ODD), max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
        "data_offsets": st.lists(st.sampled_from(ODD), min_size=1, max_size=3).map(lambda p: f"[{','.join(p)}]"),
        "extra": st.sampled_from(["1", "[[[]]]"]),
    },
)
NAMES = st.sampled_from(["a", "b", "__metadata__", "", "\\u0000", "\\ud83d", "\\ud83d\\ude00", "é"])


@FUZZ
@given(
    members=st.lists(st.tuples(NAMES, ENTRY), max_size=3),
    tail=st.sampled_from(["", " ", "}", "\x00", ",", "\ufeff"]),
    n_data=st.integers(0, 4),
)
@example(members=[("a", {"dtype": '"U8"', "shape": "[-0]", "data_offsets": "[0,0]"})], tail="", n_data=0)
def test_headers_built_of_odd_parts_are_accepted_only_where_the_reference_does(
    tmp_path: Path, members: list[tuple[str, dict[str, str]]], tail: str, n_data: int
) -> None:
    spoken = [f'"{name}":{{{",".join(f"{json.dumps(k)}:{v}" for k, v in entry.items())}}}' for name, entry in members]
    content = with_json("{" + ",".join(spoken) + "}" + tail, bytes(n_data))
    if accepts(content, tmp_path):
        assert reference_accepts(content)


@FUZZ
@given(content=st.binary(max_size=64))
def test_any_bytes_end_in_a_source_error_or_in_what_the_reference_accepts_too(tmp_path: Path, content: bytes) -> None:
    for candidate in (content, with_json(content), with_json(b"{" + content + b"}")):
        if accepts(candidate, tmp_path):
            assert reference_accepts(candidate)


def _many(n: int, form: str) -> bytes:
    return with_json("{" + ",".join(form % index for index in range(n)) + "}")


BOMBS = {
    "empty tensors": _many(10_000, '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'),
    "metadata": with_json('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(100_000)) + "}}"),
    "lists": with_json('{"a":[' + "[],[[]]," * 100_000 + "1]}"),
    "objects": with_json('{"a":' * 300_000),
    "small objects": with_json('{"a":[' + '{"":0},' * 100_000 + "0]}"),
    "dimensions": with_json('{"a":{"dtype":"U8","shape":[' + "0," * 500_000 + '0],"data_offsets":[0,0]}}'),
    "digits": with_json('{"a":{"dtype":"U8","shape":[' + "9" * 1_000_000 + '],"data_offsets":[0,0]}}'),
    "one name": with_json('{"' + "\\u0041" * 200_000 + '":{}}'),
    "spaces": with_json("{" + " " * 1_000_000 + "}"),
    "escapes": with_json('{"' + "\\" * 1_000_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_header_makes_it_allocate_more_than_the_stated_share(tmp_path: Path, bomb: str) -> None:
    content = BOMBS[bomb]
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        accepts_it = True
        read_header(path)
    except SourceError as error:
        accepts_it = False
        assert len(str(error)) < 2_000
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert accepts_it == (bomb in ("empty tensors", "metadata", "spaces"))
    assert peak_bytes < 35 * len(content)
