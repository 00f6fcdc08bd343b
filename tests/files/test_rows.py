"""Rows by position: numpy's own rows, and a message for a file that changed meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import safetensors_bytes

from qwq_mlx.errors import SourceError
from qwq_mlx.files.header import Header, read_header
from qwq_mlx.files.rows import read_columns, read_rows

MATRIX = np.arange(60, dtype="<f4").reshape(12, 5)


@pytest.fixture
def shard(tmp_path: Path) -> Header:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": ("F32", (3,), bytes(12)), "m": ("F32", (12, 5), MATRIX.tobytes())}))
    return read_header(path)


@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 7, 8, 11], [11, 0, 1, 0], range(4, 9), range(0)])
def test_rows_come_in_the_order_given(shard: Header, rows: list[int]) -> None:
    found = read_rows(shard, shard.tensors["m"], rows).view("<f4")
    np.testing.assert_array_equal(found, MATRIX[list(rows)])


def test_without_rows_the_whole_tensor_comes(shard: Header) -> None:
    np.testing.assert_array_equal(read_rows(shard, shard.tensors["m"]).view("<f4"), MATRIX.reshape(1, -1))
    assert read_rows(shard, shard.tensors["a"]).shape == (1, 12)


@pytest.mark.parametrize(("row_bytes", "n_ranks", "share"), [(8192, 2, 2), (16_384, 4, 4), (2048, 2, 1), (10, 2, 1)])
def test_of_long_rows_the_bytes_of_some_columns_alone_are_read(
    row_bytes: int, n_ranks: int, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of short ones all, in one go: what lies between is less than the file system reads in any case."""
    matrix = np.random.default_rng(row_bytes).integers(0, 256, (40, row_bytes), np.uint8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"m": ("U8", matrix.shape, matrix.tobytes())}))
    shard, read, pread = read_header(path), list[int](), os.pread
    monkeypatch.setattr(os, "pread", lambda *of: (read.append(of[1]), pread(*of))[1])
    for rank in range(n_ranks):
        read.clear()
        columns = range(rank * row_bytes // n_ranks, (rank + 1) * row_bytes // n_ranks)
        found = read_columns(shard, shard.tensors["m"], columns)
        np.testing.assert_array_equal(found, matrix[:, columns.start : columns.stop])
        assert sum(read) == matrix.nbytes // share and len(read) == (1 if share == 1 else len(matrix))


def test_a_file_that_became_shorter_is_named_with_the_byte(shard: Header) -> None:
    os.truncate(shard.path, shard.size_bytes - 8)
    with pytest.raises(
        SourceError, match=rf"model\.safetensors: tensor m: the file ends at byte {shard.size_bytes - 8}, it had"
    ):
        read_rows(shard, shard.tensors["m"])


def test_a_file_that_is_gone_is_named(shard: Header) -> None:
    shard.path.unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot be opened any more \(No such file"):
        read_rows(shard, shard.tensors["m"], [1])


def test_a_read_that_fails_is_named(shard: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(SourceError, match=r"tensor m: reading at byte [\d,]+ failed \(Input/output error\)"):
        read_rows(shard, shard.tensors["m"], [1])
