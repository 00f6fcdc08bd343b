"""Opening good checkpoints; tests/files/test_hostile.py has the bad ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint
from safetensors import deserialize

from qwq_mlx.files.checkpoint import assemble_checkpoint, open_checkpoint, read_weight_map
from qwq_mlx.files.header import read_header


def test_every_tensor_is_found_where_the_reference_finds_it(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert checkpoint.config == json.loads((tiny_checkpoint / "config.json").read_text())
    assert [header.path.name for header in checkpoint.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert checkpoint.extra_files == ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    seen = set()
    for header in checkpoint.shards:
        content = header.path.read_bytes()
        for name, info in deserialize(content):
            found, entry = checkpoint.tensors[name]
            assert found is header
            assert content[entry.start : entry.end] == bytes(info["data"])
            seen.add(name)
    assert seen == set(checkpoint.tensors)
    index = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())
    assert checkpoint.tensor_bytes == index["metadata"]["total_size"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors"])
def test_one_shard_needs_no_index(tmp_path: Path, name: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "one", n_shards=1)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / name)
    assert [header.path.name for header in open_checkpoint(folder).shards] == [name]


def test_hidden_files_and_folders_are_not_looked_at(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "c")
    (folder / ".cache").mkdir()
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / "figures").mkdir()
    (folder / "figures" / "stale.safetensors").write_bytes(b"never read")
    (folder / "README.md").write_text("words")
    assert "README.md" in open_checkpoint(folder).extra_files


def test_links_within_the_folder_and_to_the_hub_caches_blobs_are_followed(tmp_path: Path) -> None:
    real = write_tiny_checkpoint(tmp_path / "real")
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).tensors.keys() == open_checkpoint(real).tensors.keys()
    (real / "also.json").symlink_to("config.json")
    assert "also.json" in open_checkpoint(real).extra_files


def test_headers_from_elsewhere_are_joined_by_the_same_rules(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_checkpoint)
    joined = assemble_checkpoint(
        tiny_checkpoint,
        config=opened.config,
        weight_map=read_weight_map(tiny_checkpoint / "model.safetensors.index.json"),
        shards=[read_header(header.path) for header in opened.shards],
        extra_files=["tokenizer_config.json", "generation_config.json", "tokenizer.json"],
    )
    assert joined == opened
