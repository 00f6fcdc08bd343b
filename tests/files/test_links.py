"""Links in a checkpoint's folder: huggingface_hub's own are sound, a user's own are read when told, others refused."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import _shared_blobs as shared_blobs

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import SourceError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.manifest import read_manifest
from qwq_mlx.fit.__main__ import main as fit
from qwq_mlx.generate.__main__ import main as generate
from qwq_mlx.generate.reasoner import load
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.replay.__main__ import main as replay
from qwq_mlx.verify.__main__ import main as verify

COMMIT = "a" * 40
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def cache(tmp_path: Path, known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one snapshot, its shards put into the shared store by huggingface_hub's own functions."""
    cache = tmp_path / "hub"
    repository = cache / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in known_checkpoint.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = repository / "blobs" / digest
        shutil.copyfile(file, blob)
        if file.suffix == ".safetensors":
            assert shared_blobs.publish_blob_to_shared_store(
                blob_path=str(blob), xet_hash=digest, cache_dir=str(cache), expected_size=file.stat().st_size
            )
            assert blob.is_symlink()
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_snapshot_of_the_shared_store_is_read_without_a_word(cache: Path, tmp_path: Path) -> None:
    folder = Path(snapshot_download("acme/tiny", cache_dir=cache, local_files_only=True))
    assert open_checkpoint(folder).warnings == ()
    assert convert_checkpoint("acme/tiny", tmp_path / "out").warnings == ()
    source = read_manifest(tmp_path / "out").source
    assert (source.repository, source.commit) == ("acme/tiny", COMMIT)


def test_a_moved_cache_is_read_too(cache: Path, tmp_path: Path) -> None:
    cache.rename(tmp_path / "moved")
    open_checkpoint(tmp_path / "moved" / "models--acme--tiny" / "snapshots" / COMMIT)


def test_a_local_folder_linked_into_the_cache_is_read(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--acme--tiny" / "snapshots" / COMMIT
    (tmp_path / "local").mkdir()
    for file in snapshot.iterdir():
        (tmp_path / "local" / file.name).symlink_to(snapshot.parent.parent / "blobs" / file.readlink().name)
    assert open_checkpoint(tmp_path / "local").warnings == ()


@pytest.mark.parametrize("target", ["secret", "blobs/aa/secret", "models--acme--tiny/refs/main", "../secret"])
def test_nothing_else_of_the_cache_is_a_blob(cache: Path, target: str) -> None:
    path = cache / target
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    snapshot = cache / "models--acme--tiny" / "snapshots" / COMMIT
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to(path)
    with pytest.raises(SourceError, match=r"generation_config.json: is a link to .*, outside the folder"):
        open_checkpoint(snapshot)


def test_a_folder_that_only_looks_like_a_blob_is_refused(cache: Path, tmp_path: Path, known_checkpoint: Path) -> None:
    folder = Path(shutil.copytree(known_checkpoint, tmp_path / "source"))
    blob = tmp_path / "elsewhere" / "models--acme--tiny" / "blobs" / COMMIT
    blob.parent.mkdir(parents=True)
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to(blob)
    with pytest.raises(SourceError, match="outside the folder"):
        open_checkpoint(folder, follow_links=True)


def test_a_shard_on_another_disk_is_read_when_told_and_named(tmp_path: Path, known_checkpoint: Path) -> None:
    folder = Path(shutil.copytree(known_checkpoint, tmp_path / "source"))
    (tmp_path / "disk").mkdir()
    (folder / SHARD).rename(tmp_path / "disk" / "one.bin")
    (folder / SHARD).symlink_to(tmp_path / "disk" / "one.bin")
    with pytest.raises(SourceError, match=r"one.bin, outside the folder. If you made it, pass `follow_links=True`"):
        convert_checkpoint(folder, tmp_path / "out")
    (warning,) = convert_checkpoint(folder, tmp_path / "out", follow_links=True).warnings
    assert load(folder, follow_links=True).model.warnings == (warning,)
    assert re.search(rf"{SHARD}: is a link out of the folder; .*one\.bin is read", warning)
    convert_checkpoint(known_checkpoint, tmp_path / "plain")
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_commands_follow_links_when_told(
    tmp_path: Path, known_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(known_checkpoint, tmp_path / "source"))
    (folder / SHARD).rename(tmp_path / "one.bin")
    (folder / SHARD).symlink_to(tmp_path / "one.bin")
    convert_checkpoint(known_checkpoint, tmp_path / "out", quality=False)
    reasoner = load(known_checkpoint)
    trace = reasoner.generate("x", sampling=Sampling(temperature=0), limits=Limits(max_tokens=2))
    reasoner.receipt(trace).save(tmp_path / "receipt.json")
    for main, arguments in (
        (generate, ["--model", str(folder), "-p", "x", "--max-tokens", "1", "--quiet"]),
        (fit, ["--model", str(folder)]),
        (verify, [str(tmp_path / "out"), "--source", str(folder)]),
        (replay, [str(tmp_path / "receipt.json"), "--model", str(folder)]),
    ):
        assert main(arguments) != 0
        assert "pass --follow-links to read the shard where it is" in capsys.readouterr().err
        assert main([*arguments, "--follow-links"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("name", "target"), [("config.json", "/etc/passwd"), (SHARD, "/dev/zero"), (SHARD, "/tmp")])
def test_when_told_still_only_regular_shards_are_followed(
    tmp_path: Path, known_checkpoint: Path, name: str, target: str
) -> None:
    folder = Path(shutil.copytree(known_checkpoint, tmp_path / "source"))
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    with pytest.raises(SourceError, match=f"{name}: is a link to {target}, outside the folder"):
        open_checkpoint(folder)


def test_a_shard_on_a_disk_that_is_not_there_is_not_called_hostile(tmp_path: Path, known_checkpoint: Path) -> None:
    folder = Path(shutil.copytree(known_checkpoint, tmp_path / "source"))
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/Volumes/T7/" + SHARD)
    with pytest.raises(SourceError, match=r"where there is no file. Mount the disk that it is on, or fetch the shard"):
        open_checkpoint(folder, follow_links=True)
