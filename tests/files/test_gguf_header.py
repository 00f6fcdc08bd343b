"""The GGUF header reader: agreement with the gguf package, and every damaged or malicious file that we know."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from gguf_files import ARRAY, BOOL, STRING, U32, U64, Entry, encoded, gguf_bytes, text

from qwq_mlx.errors import SourceError
from qwq_mlx.files.gguf.header import GgufHeader, read_gguf_header, read_gguf_header_by
from qwq_mlx.files.gguf.scan import MAX_HEADER_BYTES

METADATA = {
    "general.architecture": "qwen2",
    "a.flag": True,
    "a.number": (U64, 7),
    "a.real": 1.5,
    "a.list": ["x", "yz", ""],
    "a.ids": [1, -2, 3],
}
TENSORS: dict[str, Entry] = {
    "token_embd.weight": ("Q4_0", (2, 64), bytes(72)),
    "output_norm.weight": ("F32", (5,), bytes(20)),
    "blk.0.attn_q.weight": ("F16", (3, 4), bytes(24)),
}
GOOD = gguf_bytes(METADATA, TENSORS)


def read(raw: bytes, arrays: tuple[str, ...] = ()) -> GgufHeader:
    return read_gguf_header_by(lambda start, n: raw[start : start + n], Path("model.gguf"), len(raw), arrays=arrays)


def test_a_file_of_the_gguf_package_is_read_as_it_was_written(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_uint32("qwen2.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["Ġthe", "世界", "!"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path, arrays=("tokenizer.ggml.tokens",))
    assert dict(header.metadata) == {
        "general.architecture": "qwen2",
        "qwen2.block_count": 2,
        "tokenizer.ggml.tokens": ["Ġthe", "世界", "!"],
        "qwen2.rope.freq_base": 1e6,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert header.array_lengths == {"tokenizer.ggml.tokens": 3, "tokenizer.ggml.token_type": 3}
    assert_same_tensors(header, path)


def assert_same_tensors(header: GgufHeader, path: Path) -> None:
    theirs = {
        each.name: (each.tensor_type.name, tuple(map(int, reversed(each.shape))), each.data_offset, each.n_bytes)
        for each in GGUFReader(path).tensors
    }
    ours = {
        each.name: (each.type.name, each.shape, each.start, each.end - each.start) for each in header.tensors.values()
    }
    assert ours == theirs


def test_arrays_are_kept_where_they_are_asked_for() -> None:
    header = read(GOOD, arrays=("a.list", "a.ids"))
    assert (header.metadata["a.list"], header.metadata["a.ids"]) == (["x", "yz", ""], [1, -2, 3])
    assert "a.list" not in read(GOOD).metadata
    assert read(GOOD).metadata == {key: 7 if key == "a.number" else METADATA[key] for key in list(METADATA)[:4]}


@pytest.mark.parametrize("alignment", [8, 64])
def test_another_alignment_is_honoured(alignment: int) -> None:
    raw = gguf_bytes({**METADATA, "general.alignment": alignment}, TENSORS, alignment=alignment)
    assert [each.start % alignment for each in read(raw).tensors.values()] == [0, 0, 0]


def test_version_2_and_a_file_without_padding_at_its_end_are_read() -> None:
    assert read(gguf_bytes(METADATA, TENSORS, version=2)[:-8]).version == 2


def one(
    key: bytes = b"k", value: bytes = encoded(1), *, n_keys: int = 1, n_tensors: int = 0, more: bytes = b""
) -> bytes:
    """A file with one key."""
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + text(key) + value + more


def tensor(
    name: bytes = b"t",
    shape: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    *,
    n_dimensions: int | None = None,
) -> bytes:
    n = len(shape) if n_dimensions is None else n_dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n, *shape, kind, offset)


def with_tensors(*entries: bytes, n_data: int = 128, n: int | None = None) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries) if n is None else n, 0) + b"".join(entries)
    return head + bytes(-len(head) % 32 + n_data)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"begins with b'' \(0 bytes\), expected a GGUF file"),
    "HTML": (b"<!DOCTYPE html><html>", "is an HTML page .* expected a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "expected a GGUF file"),
    "magic alone": (b"GGUF", "the version: needs 4 bytes at byte 4, but the file ends after 4. The download was cut"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is of GGUF version 1, expected 2 or 3"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "is of GGUF version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "for big-endian machines"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "says that it has 9,223,372,036,854,775,808"),
    "keys without end": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40),
        "says that it has 1,099,511,627,776 keys, expected",
    ),
    "key of 2^60 bytes": (one()[:24] + struct.pack("<Q", 2**60), "has 1,152,921,504,606,846,976 bytes"),
    "empty key": (one(b""), "key 1 of 1 is '', expected 1 to 256 printable"),
    "key with an escape": (one(b"\x1b[31m"), r"key 1 of 1 is '\\x1b\[31m', expected"),
    "key not UTF-8": (one(b"\xff\xfe"), "key 1 of 1 is not UTF-8"),
    "key twice": (one(more=text("k") + encoded(2), n_keys=2), "has the key 'k' twice"),
    "type 13": (one(value=struct.pack("<II", 13, 0)), "k is of type 13, expected one of 0 to 12"),
    "text of 2 MiB": (
        one(value=struct.pack("<IQ", STRING, 2 << 20)),
        "k has 2,097,152 bytes, expected at most 1,048,576",
    ),
    "truth of 2": (one(value=struct.pack("<IB", BOOL, 2)), "k is true or false, but has a byte of 2"),
    "array of arrays": (one(value=struct.pack("<IIQ", ARRAY, ARRAY, 1)), "k is an array of arrays"),
    "array of type 99": (one(value=struct.pack("<IIQ", ARRAY, 99, 0)), "k is of type 99"),
    "array without end": (one(value=struct.pack("<IIQ", ARRAY, U32, 2**62)), "has 4,611,686,018,427,387,904 elements"),
    "texts without end": (
        one(value=struct.pack("<IIQ", ARRAY, STRING, 2**61)),
        "elements, more than the file has bytes for",
    ),
    "text in an array": (
        one(value=struct.pack("<IIQQ", ARRAY, STRING, 1, 2**33)),
        "k: text 0 has 8,589,934,592 bytes, expected at most 4,096",
    ),
    "cut in an array": (one(value=struct.pack("<IIQQ", ARRAY, STRING, 1, 9)), "k: needs 9 bytes at byte"),
    "alignment 0": (one(b"general.alignment", encoded(0)), "general.alignment is 0, expected a power of two"),
    "alignment 24": (one(b"general.alignment", encoded(24)), "general.alignment is 24, expected a power of two"),
    "alignment 2^30": (one(b"general.alignment", encoded(1 << 30)), "expected a power of two up to 1,048,576"),
    "alignment in words": (one(b"general.alignment", encoded("32")), "general.alignment is of type 8, expected 4"),
    "alignment of 8 bits": (
        one(b"general.alignment", struct.pack("<IB", 0, 32)),
        "is of type 0, expected 4, an unsigned",
    ),
    "five dimensions": (with_tensors(tensor(shape=(1,) * 5)), "tensor t: has 5 dimensions, expected 1 to 4"),
    "dimensions without end": (with_tensors(tensor(n_dimensions=2**31)), "tensor t: has 2,147,483,648 dimensions"),
    "no dimension": (with_tensors(tensor(shape=())), "tensor t: has 0 dimensions"),
    "dimension 0": (
        with_tensors(tensor(shape=(0, 32))),
        r"tensor t: has the shape \(32, 0\) at offset 0, expected sizes",
    ),
    "shape beyond 64 bits": (with_tensors(tensor(shape=(2**40, 2**40))), "expected sizes from 1 that fit 64 bits"),
    "type of ggml's future": (with_tensors(tensor(kind=77)), "tensor t: is of type 77, which is not known"),
    "type that was removed": (with_tensors(tensor(kind=4)), "tensor t: is of type 4, which is not known"),
    "half a block": (with_tensors(tensor(shape=(48, 2), kind=2)), "rows of 48 weights, expected a multiple of 32"),
    "offset off the grid": (with_tensors(tensor(offset=4)), "tensor t: begins at offset 4, expected a multiple of 32"),
    "offset of 2^63": (with_tensors(tensor(offset=2**63)), "expected sizes from 1 that fit"),
    "offset past the end": (with_tensors(tensor(offset=2**20)), "bytes between it and the header belong to no tensor"),
    "overlap": (with_tensors(tensor(b"a"), tensor(b"b", offset=96)), "tensor b: its data overlap those of tensor a"),
    "two in one place": (with_tensors(tensor(b"a"), tensor(b"b")), "overlap those of tensor a"),
    "a hole": (
        with_tensors(tensor(b"a"), tensor(b"b", offset=256), n_data=384),
        "the 128 bytes between it and tensor a",
    ),
    "a tensor twice": (with_tensors(tensor(), tensor(offset=128), n_data=256), "tensor t: is there twice"),
    "cut download": (with_tensors(tensor(), n_data=100), "ends 28 bytes early: .* The download was cut off"),
    "something behind": (with_tensors(tensor(), n_data=160), "has 32 bytes after tensor t, expected none"),
    "more tensors than there are": (with_tensors(tensor(), n=9), "the name of tensor 2 is"),
    "tensor name of 300 bytes": (
        with_tensors(tensor(b"n" * 300)),
        "the name of tensor 1 has 300 bytes, expected at most 256",
    ),
}


@pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_ends_in_one_line(raw: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read(raw)
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)
    assert re.search(r"Fetch the file again\.$", str(caught.value))


def test_what_a_header_claims_does_not_become_memory() -> None:
    """An array of a million empty texts takes 8 MB of file."""
    raw = one(value=struct.pack("<IIQ", ARRAY, STRING, (1 << 20) + 1) + bytes(8 << 20) + bytes(8))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="k has 1,048,577 elements, expected at most 1,048,576"):
            read(raw, arrays=("k",))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_header_that_does_not_end_is_given_up() -> None:
    element = struct.pack("<Q", 4096) + bytes(4096)
    size = MAX_HEADER_BYTES + (1 << 20)
    head = one(value=struct.pack("<IIQ", ARRAY, STRING, size // len(element)))

    def endless(start: int, n_bytes: int) -> bytes:
        if start < len(head):
            return (head + element * (n_bytes // len(element) + 1))[start : start + n_bytes]
        at = (start - len(head)) % len(element)
        return (element * (n_bytes // len(element) + 2))[at : at + n_bytes]

    with pytest.raises(SourceError, match="the header goes on after 67,108,864 bytes, expected it to end before"):
        read_gguf_header_by(endless, Path("model.gguf"), size + len(head))


def test_a_fifo_and_a_missing_file_are_named(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"is not a regular file, expected a GGUF file"):
        read_gguf_header(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"cannot be opened .* Check that it exists"):
        read_gguf_header(tmp_path / "other.gguf")


def test_300_mutated_headers_are_refused_by_a_line_or_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    """scripts/fuzz_gguf.py does the same with a million."""
    choose, path = random.Random(19), tmp_path / "mutated.gguf"
    head_bytes = read(GOOD).data_start
    accepted = 0
    for _ in range(300):
        raw = bytearray(GOOD)
        for _ in range(choose.randint(1, 3)):
            raw[choose.randrange(4, head_bytes)] = choose.choice((0, 1, 255, choose.randrange(256)))
        try:
            header = read(bytes(raw))
        except SourceError:
            continue
        path.write_bytes(raw)
        assert_same_tensors(header, path)
        accepted += 1
    assert accepted > 20
