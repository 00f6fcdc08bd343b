"""Digests are hashlib's, of the bytes that they are said to be of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.files import digest
from qwq_mlx.files.digest import sha256_file, sha256_header, sha256_shard
from qwq_mlx.files.header import read_header


def test_a_files_digest_is_of_all_its_bytes_and_progress_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_BLOCK_BYTES", 1_000)
    content = os.urandom(12_345)
    path = tmp_path / "f"
    path.write_bytes(content)
    done: list[int] = []
    assert sha256_file(path, done.append) == hashlib.sha256(content).hexdigest()
    assert sum(done) == 12_345
    assert len(done) == 13


def test_a_shards_digests_are_of_the_file_its_header_and_each_tensor(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_BLOCK_BYTES", 7_000)
    header = read_header(tiny_checkpoint / "model-00001-of-00002.safetensors")
    content = header.path.read_bytes()
    done: list[int] = []
    found = sha256_shard(header, done.append)
    assert found.file == hashlib.sha256(content).hexdigest()
    assert found.header == hashlib.sha256(content[: header.data_start]).hexdigest() == sha256_header(header)
    assert found.tensors == {
        name: hashlib.sha256(content[entry.start : entry.end]).hexdigest() for name, entry in header.tensors.items()
    }
    assert sum(done) == len(content)


def test_a_file_that_is_missing_short_or_unreadable_is_named(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"absent: cannot be opened \(No such file or directory\)\. Check"):
        sha256_file(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"cannot be read \(Is a directory\)\. Check"):
        sha256_file(tmp_path)
    path = tmp_path / "shard.safetensors"
    path.write_bytes((tiny_checkpoint / "model-00001-of-00002.safetensors").read_bytes())
    header = read_header(path)
    os.truncate(path, header.size_bytes - 1)
    with pytest.raises(
        SourceError, match=r"shard\.safetensors: ended inside tensor \S+ while it was read\. Make it again"
    ):
        sha256_shard(header)
