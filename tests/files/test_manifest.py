"""A manifest proves its folder: every single changed byte, missing, extra or renamed file is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.files import manifest as manifest_module
from qwq_mlx.files.digest import sha256_shard
from qwq_mlx.files.header import read_header
from qwq_mlx.files.manifest import (
    SCHEMA,
    FileRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
    check_sizes,
    read_manifest,
    record_file,
    verify_full,
    write_manifest,
)


def manifest_of(folder: Path) -> Manifest:
    files, tensors = {}, {}
    for path in sorted(folder.iterdir()):
        files[path.name], digest = record_file(path)
        if digest is not None:
            for name, entry in read_header(path).tensors.items():
                tensors[name] = TensorRecord(
                    shard=path.name, dtype=entry.dtype, shape=entry.shape, sha256=digest.tensors[name]
                )
    first = next(iter(tensors))
    tensors[first] = replace(tensors[first], relative_error=0.0625)
    return Manifest(
        source=SourceRecord(
            repository="a/b", commit="0" * 40, files={"config.json": FileRecord(size_bytes=3, sha256="ab")}
        ),
        recipe={"mode": "affine", "bits": 4, "group_size": 64, "overrides": []},
        fit="min-max",
        versions={"qwq_mlx": "0.1.0"},
        files=files,
        tensors=tensors,
        run={"wall_s": 1.5, "peak_memory_bytes": 7},
    )


@pytest.fixture
def proven(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with its manifest."""
    folder = tmp_path / "proven"
    shutil.copytree(tiny_checkpoint, folder)
    write_manifest(folder, manifest_of(tiny_checkpoint))
    return folder


def test_what_is_written_is_read_and_twice_the_same_bytes(proven: Path, tiny_checkpoint: Path) -> None:
    written = manifest_of(tiny_checkpoint)
    assert read_manifest(proven) == written
    before = (proven / "manifest.json").read_bytes()
    write_manifest(proven, written)
    assert (proven / "manifest.json").read_bytes() == before
    assert check_sizes(proven) == written
    done: list[int] = []
    assert verify_full(proven, done.append) == written
    assert sum(done) == sum(record.size_bytes for record in written.files.values())


def test_its_records_are_sizes_and_hashlibs_digests(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "model-00002-of-00002.safetensors"
    content = path.read_bytes()
    n_header = 8 + int.from_bytes(content[:8], "little")
    record, digest = record_file(path)
    assert record == FileRecord(
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        header_sha256=hashlib.sha256(content[:n_header]).hexdigest(),
    )
    assert digest is not None
    config = tiny_checkpoint / "config.json"
    assert record_file(config) == (
        FileRecord(size_bytes=config.stat().st_size, sha256=hashlib.sha256(config.read_bytes()).hexdigest()),
        None,
    )


def test_a_flipped_bit_anywhere_is_found_and_named(proven: Path) -> None:
    """40 random bits of each file: the full check sees all, the cheap one all but the tensors' data."""
    choose = random.Random(7)
    for path in sorted(proven.iterdir()):
        content = path.read_bytes()
        data_start = read_header(path).data_start if path.suffix == ".safetensors" else len(content)
        for _ in range(40):
            position = choose.randrange(len(content))
            path.write_bytes(
                content[:position] + bytes([content[position] ^ 1 << choose.randrange(8)]) + content[position + 1 :]
            )
            with pytest.raises(SourceError) as full:
                verify_full(proven)
            assert path.name in str(full.value)
            if position < data_start:
                with pytest.raises(SourceError, match=path.name.replace(".", r"\.")):
                    check_sizes(proven)
            else:
                check_sizes(proven)
        path.write_bytes(content)
    verify_full(proven)


def test_a_changed_tensor_is_named(proven: Path) -> None:
    path = proven / "model-00001-of-00002.safetensors"
    entry = list(read_header(path).tensors.values())[2]
    with path.open("r+b") as file:
        file.seek(entry.end - 1)
        last = file.read(1)[0]
        file.seek(entry.end - 1)
        file.write(bytes([last ^ 0x80]))
    digests = rf"\(sha256 {sha256_shard(read_header(path)).tensors[entry.name][:12]}…, expected [0-9a-f]{{12}}…\)"
    name = re.escape(f"model-00001-of-00002.safetensors: {entry.name}")
    with pytest.raises(SourceError, match=rf"1 of other bytes than the manifest's: {name} {digests}\."):
        verify_full(proven)


def test_every_difference_of_the_folder_is_listed(proven: Path) -> None:
    (proven / "tokenizer.json").unlink()
    (proven / "generation_config.json").write_text("{}\n")
    os.truncate(proven / "model-00002-of-00002.safetensors", 1_000)
    (proven / "model-old.safetensors").write_bytes(b"")
    (proven / "chat_template.jinja").write_text("")
    with pytest.raises(SourceError) as error:
        check_sizes(proven)
    message = str(error.value)
    assert "proven: is not the folder that its manifest.json describes." in message
    assert "1 missing: tokenizer.json." in message
    assert "2 of another size: generation_config.json (3 bytes, expected " in message
    assert "model-00002-of-00002.safetensors (1,000 bytes, expected " in message
    assert "2 that the manifest does not list: chat_template.jinja, model-old.safetensors." in message
    assert message.endswith("Convert the source again, or copy the folder again from where it was whole.")


def test_notes_beside_the_model_do_not_stop_a_load_but_are_not_proven(proven: Path) -> None:
    (proven / ".DS_Store").write_bytes(b"\x00")
    verify_full(proven)
    (proven / "notes.txt").write_text("mine")
    check_sizes(proven)
    with pytest.raises(SourceError, match=r"1 that the manifest does not list: notes\.txt\."):
        verify_full(proven)


def test_a_long_list_is_counted(proven: Path) -> None:
    for number in range(14):
        (proven / f"extra-{number:02d}.json").write_text("{}")
    with pytest.raises(SourceError, match=r"14 that the manifest does not list: extra-00\.json, .* and 4 more\."):
        check_sizes(proven)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "..", "a/b"])
def test_a_manifest_that_leads_out_of_its_folder_finds_nothing(proven: Path, name: str) -> None:
    manifest = read_manifest(proven)
    (proven.parent / "outside").write_bytes(b"x")
    record = FileRecord(size_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    write_manifest(proven, replace(manifest, files={**manifest.files, name: record}))
    with pytest.raises(SourceError, match="1 missing: "):
        check_sizes(proven)


def rewritten(proven: Path, *, schema: int = SCHEMA, **changes: object) -> None:
    """A manifest with changed fields and a digest that fits them."""
    value = json.loads((proven / "manifest.json").read_text())
    del value["digest"], value["schema"]
    for key, change in changes.items():
        value[key] = change
        if change is None:
            del value[key]
    (proven / "manifest.json").write_bytes(manifest_module._encode(value, schema))


def test_missing_edited_and_foreign_manifests_are_refused(proven: Path) -> None:
    path = proven / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"min-max"', '"min-mix"'))
    with pytest.raises(
        SourceError, match=r"manifest\.json: its digest is '[0-9a-f]{64}', which its content does not have"
    ):
        read_manifest(proven)
    path.write_text(text.replace("\n", "\n\n", 1))
    with pytest.raises(SourceError, match="which its content does not have"):
        read_manifest(proven)
    path.write_text(text.replace('"schema": 4', '"schema": 5'))
    with pytest.raises(
        SourceError,
        match=r"schema is 5, expected one of 1, 2, 3, 4\. A newer qwq_mlx made it: update this one, or convert",
    ):
        read_manifest(proven)
    path.write_text(text.replace('"schema": 4', '"schema": 0'))
    with pytest.raises(
        SourceError, match=r"schema is 0, expected one of 1, 2, 3, 4\. Use the qwq_mlx that made it, or"
    ):
        read_manifest(proven)
    path.write_text(text)
    rewritten(proven, fit=None)
    with pytest.raises(SourceError, match=r"is not of schema 4: fit is missing, expected a value"):
        read_manifest(proven)
    path.unlink()
    with pytest.raises(SourceError, match=r"manifest\.json: there is no such file\. Convert"):
        read_manifest(proven)


def test_a_manifest_that_cannot_be_read_again_is_named(proven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(SourceError, match=r"manifest\.json: cannot be read \(Input/output error\)"):
        read_manifest(proven)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.json: cannot be read \(No such file or directory\)"):
        record_file(tmp_path / "gone.json")


def test_a_quality_record_comes_back_and_schema_1_had_none(proven: Path) -> None:
    manifest = read_manifest(proven)
    assert manifest.quality is None
    record = {"kl": 0.25, "text": "a.txt", "drift": [0.0, 0.5], "worst": [{"context": "\x00 é"}]}
    write_manifest(proven, replace(manifest, quality=record))
    assert read_manifest(proven).quality == record
    write_manifest(proven, manifest)
    rewritten(proven, schema=1, quality=None, calibration=None)  # None: the key is left out
    assert json.loads((proven / "manifest.json").read_text())["schema"] == 1
    assert read_manifest(proven) == manifest
    verify_full(proven)
    rewritten(proven, schema=2, quality=None)
    with pytest.raises(SourceError, match=r"is not of schema 2: quality is missing"):
        read_manifest(proven)


def test_a_manifest_of_schema_2_is_read_with_and_without_calibration_and_later_ones_need_their_keys(
    proven: Path,
) -> None:
    """Schema 2 is from before that key; builds before the first release wrote it under 2 all the same."""
    text = {"file": "text.txt", "sha256": "0" * 64, "n_texts": 2, "n_ids": 600}
    for schema, calibration in ((2, None), (2, text), (3, text)):
        rewritten(proven, schema=schema, calibration=calibration)
        assert read_manifest(proven).calibration == calibration
        verify_full(proven)
    write_manifest(proven, replace(read_manifest(proven), calibration=None))
    assert json.loads((proven / "manifest.json").read_text())["schema"] == SCHEMA == 4
    rewritten(proven, schema=3, calibration=None)
    with pytest.raises(SourceError, match=r"is not of schema 3: calibration is missing"):
        read_manifest(proven)
    rewritten(proven, schema=3, calibration=text, gguf=None)
    assert read_manifest(proven).gguf is None
    rewritten(proven, schema=4)
    with pytest.raises(SourceError, match=r"is not of schema 4: gguf is missing"):
        read_manifest(proven)
