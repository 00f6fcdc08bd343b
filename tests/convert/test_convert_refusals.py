"""What cannot be converted is refused by name before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import encode_floats, safetensors_bytes, write_json, write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import ConversionError, LoadError, OptionError, QwqError, RecipeError, SourceError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def refuse(source: Path, error: type[QwqError], message: str, **options: object) -> None:
    """The conversion is refused with this message, and nothing but the source lies beside it afterwards."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error, match=message):
        convert_checkpoint(source, source.parent / "out", **options)
    assert sorted(source.parent.iterdir()) == before


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    write_json(
        source / "config.json", {key: value for key, value in {**config, **changes}.items() if value is not None}
    )


def add_tensor(source: Path, name: str, *, shard: str, in_index: bool = True) -> None:
    """Write one more shard that holds `name` alone."""
    data = encode_floats(np.ones((2, 64), np.float32), "BF16")
    (source / shard).write_bytes(safetensors_bytes({name: ("BF16", (2, 64), data)}))
    if in_index:
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = shard
        write_json(path, index)


def test_a_width_that_the_group_does_not_divide_is_refused_naming_every_matrix(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", intermediate_size=160, n_layers=1)
    message = (
        r"source: 1 matrices whose rows the group does not divide: model\.layers\.0\.mlp\.down_proj\.weight has rows "
        r"of 160, the group is 64 \(recipe qwq-32b-preview-4bit\)\. Use a smaller group_size"
    )
    refuse(source, ConversionError, message)


def test_an_override_can_keep_what_does_not_divide(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", intermediate_size=160, n_layers=1)
    recipe = tmp_path / "keep.toml"
    recipe.write_text('[weights]\n[[override]]\nmatch = "*.down_proj"\nkeep = true\n')
    assert convert_checkpoint(source, tmp_path / "out", recipe=recipe).is_written
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert settings["model.layers.0.mlp.down_proj"] is False


def test_an_unknown_tensor_is_refused(source: Path) -> None:
    add_tensor(source, "model.layers.0.extra.weight", shard="model-00003-of-00003.safetensors")
    refuse(source, LoadError, r"1 unknown: model\.layers\.0\.extra\.weight\.")


def test_layers_more_or_fewer_than_the_tensors_are_refused(source: Path) -> None:
    edit_config(source, num_hidden_layers=3)
    refuse(source, LoadError, r"12 missing: model\.layers\.2\.input_layernorm\.weight, ")
    edit_config(source, num_hidden_layers=1)
    refuse(source, LoadError, r"12 unknown: model\.layers\.1\.input_layernorm\.weight, ")


def test_a_tensor_in_two_shards_is_refused(source: Path) -> None:
    add_tensor(source, "model.norm.weight", shard="model-00003-of-00003.safetensors")
    refuse(source, SourceError, r"tensor model\.norm\.weight is also in ")


def test_a_stale_shard_is_refused(source: Path) -> None:
    add_tensor(source, "model.norm.weight", shard="model-old.safetensors", in_index=False)
    refuse(source, SourceError, r"index\.json does not name: model-old\.safetensors\.")


def test_a_config_that_disagrees_with_the_tensors_is_refused(source: Path) -> None:
    edit_config(source, intermediate_size=256)
    refuse(
        source,
        LoadError,
        r"6 of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(128, 192\), expected \(128, 256\)",
    )


def test_tied_embeddings_that_the_tensors_do_not_have_are_refused_both_ways(source: Path, tmp_path: Path) -> None:
    edit_config(source, tie_word_embeddings=True)
    refuse(source, SourceError, r"tie_word_embeddings true, but lm_head\.weight is not model\.embed_tokens")
    (tmp_path / "tied").mkdir()
    tied = write_tiny_checkpoint(tmp_path / "tied" / "source", tie=True)
    edit_config(tied, tie_word_embeddings=False)
    refuse(tied, LoadError, r"1 missing: lm_head\.weight\.")


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_source_that_is_packed_already_is_refused(source: Path, key: str) -> None:
    edit_config(source, **{key: {"bits": 4}})
    add_tensor(source, "lm_head.scales", shard="model-00003-of-00003.safetensors")
    refuse(source, ConversionError, rf"config\.json: has {key}, so its weights are packed already \(lm_head\.scales\)")


def test_a_label_of_the_other_16_bit_type_on_one_tensor_is_refused(source: Path) -> None:
    for shard in SHARDS:
        raw = (source / shard).read_bytes()
        (source / shard).write_bytes(
            raw.replace(b'"model.norm.weight":{"dtype":"BF16"', b'"model.norm.weight":{"dtype":"F16" ')
        )
    refuse(source, SourceError, r"another type than BF16, .*: F16: model\.norm\.weight\. Expected .* not both")


def test_one_tensor_of_another_dtype_is_refused_even_where_config_names_none(source: Path) -> None:
    edit_config(source, torch_dtype=None)
    for shard in SHARDS:
        raw = (source / shard).read_bytes()
        (source / shard).write_bytes(
            raw.replace(b'"model.norm.weight":{"dtype":"BF16"', b'"model.norm.weight":{"dtype":"I16" ')
        )
    refuse(source, SourceError, r"another type than BF16, which most of them have: I16: model\.norm\.weight\.")


def test_a_source_without_a_tokenizer_or_with_another_models_is_refused(source: Path) -> None:
    raw = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").unlink()
    refuse(source, LoadError, r"tokenizer\.json: there is no such file")
    other = json.loads(raw)
    other["model"]["vocab"]["A"] = 929
    write_json(source / "tokenizer.json", other)
    refuse(source, LoadError, r"tokenizer\.json: the largest id is 929, the model's embedding has 320 rows")


def test_a_damaged_generation_config_is_refused(source: Path) -> None:
    (source / "generation_config.json").write_text("{oh")
    refuse(source, SourceError, r"generation_config\.json: is not JSON")


def test_a_recipe_whose_pattern_fits_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('[weights]\n[[override]]\nmatch = "*.w_proj"\nbits = 8\n')
    refuse(source, RecipeError, r"own\.toml, line 3: match \['\*\.w_proj'\]", recipe=recipe)


def test_an_unknown_recipe_and_a_wrong_number_of_workers_are_refused(source: Path) -> None:
    refuse(source, RecipeError, "There is no recipe '7bit'", recipe="7bit")
    refuse(source, OptionError, r"n_workers is 0, expected a whole number from 1 to 64\.", n_workers=0)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_shard_is_refused(source: Path, shard: str, cut: int) -> None:
    os.truncate(source / shard, (source / shard).stat().st_size - cut)
    refuse(source, SourceError, rf"{shard}: ends {'1 byte' if cut == 1 else '1,000 bytes'} early")


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", SourceError, "none: there is no such folder")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", SourceError, "file: is a file, expected the folder of a checkpoint")
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "q4.gguf", SourceError, r"q4.gguf: the version: needs 4 bytes .* The download was cut")
    (tmp_path / "q4").mkdir()
    (tmp_path / "q4.gguf").rename(tmp_path / "q4" / "q4.gguf")
    (tmp_path / "q4" / "config.json").write_text("{}")
    refuse(tmp_path / "q4", SourceError, r"q4: holds q4.gguf. Give that file itself: .*/q4/q4.gguf")


def convert_into(source: Path, output: Path, message: str, **options: object) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, output, **options)


def test_an_existing_output_is_refused_with_what_to_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_into(
        tiny_checkpoint,
        tmp_path / "out",
        r"out: exists already\. Choose another output, or pass `force=True`",
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_force_replaces_a_model_but_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    convert_into(tiny_checkpoint, output, r"out: holds files but no config\.json, so it is not a model", force=True)
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "config.json").write_text("{}")
    convert_checkpoint(tiny_checkpoint, output, force=True)
    assert not (output / "thesis.txt").exists() and (output / "manifest.json").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_force_keeps_the_old_folder_when_the_new_one_fails(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert_checkpoint(source, output)
    old = (output / "manifest.json").read_bytes()
    poison(source, SHARDS[1])
    convert_into(source, output, "is NaN or infinite", force=True)
    assert (output / "manifest.json").read_bytes() == old


def poison(source: Path, shard: str) -> None:
    """Make the last weight of a shard a NaN."""
    raw = bytearray((source / shard).read_bytes())
    raw[-2:] = b"\xc0\x7f"
    (source / shard).write_bytes(raw)


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_an_output_in_the_source_or_around_it_is_refused(source: Path, place: str) -> None:
    convert_into(source, source.parent / place, "lies in the source .*, or holds it", force=True)


def test_an_output_that_is_a_file_or_under_one_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    convert_into(tiny_checkpoint, tmp_path / "file", "file: is not a folder", force=True)
    convert_into(tiny_checkpoint, tmp_path / "file" / "out", r"file is not a folder one may write in")


def test_too_little_disk_is_refused_with_the_figures(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("qwq_mlx.convert.preflight._MARGIN", 1e6)
    convert_into(tiny_checkpoint, tmp_path / "out", r"out: needs \d+\.\d\d GB more on its disk, 1\.00 kB are free\.")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_has_the_name_of_an_unfinished_conversion_is_not_touched(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    convert_into(tiny_checkpoint, tmp_path / "out", r"out\.partial: is not an unfinished conversion", restart=True)
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_nan_and_infinity_are_named_with_shard_tensor_row_and_column(source: Path) -> None:
    poison(source, SHARDS[1])
    convert_into(
        source, source.parent / "out", rf"{SHARDS[1]}: tensor lm_head\.weight: the weight at row 319, column 127 is NaN"
    )
    raw = bytearray((source / SHARDS[1]).read_bytes())
    raw[-2:] = b"\x00\x3f"
    (source / SHARDS[1]).write_bytes(raw)
    convert_checkpoint(source, source.parent / "out", restart=True)


def test_a_nan_in_a_vector_is_named_with_its_position(source: Path) -> None:
    from qwq_mlx.files.header import read_header

    entry = read_header(source / SHARDS[0]).tensors["model.layers.0.self_attn.k_proj.bias"]
    raw = bytearray((source / SHARDS[0]).read_bytes())
    raw[entry.start + 6 : entry.start + 8] = b"\x80\xff"
    (source / SHARDS[0]).write_bytes(raw)
    convert_into(source, source.parent / "out", r"k_proj\.bias: the weight at position 3 is NaN or infinite")


def test_code_of_the_source_is_neither_run_nor_copied_nor_named(source: Path) -> None:
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (source / "README.md").write_text("card")
    edit_config(source, auto_map={"AutoModel": "modeling_evil.Evil"}, model_file="modeling_evil.py")
    convert_checkpoint(source, source.parent / "out")
    assert not list((source.parent / "out").glob("*.py"))
    assert b"evil" not in (source.parent / "out" / "config.json").read_bytes()


def test_a_disk_that_reads_back_other_bytes_is_noticed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwq_mlx.convert import job

    run_pipeline = job.run_pipeline

    def flip(plan: object, folder: Path, *rest: object) -> None:
        run_pipeline(plan, folder, *rest)
        path = folder / "model-00001-of-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(job, "run_pipeline", flip)
    convert_into(
        source, source.parent / "out", r"model: 1 tensors read back are not what was written: lm_head\.biases\."
    )
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [(["lm_head.weight"], "finds other tensors in it"), (None, r"cannot read it \(odd header\)")],
)
def test_a_shard_that_the_reference_reads_otherwise_is_not_published(
    source: Path, monkeypatch: pytest.MonkeyPatch, names: list[str] | None, message: str
) -> None:
    from safetensors import SafetensorError

    @contextmanager
    def safe_open(path: Path, framework: str) -> Iterator[Any]:
        if names is None:
            raise SafetensorError("odd header")
        yield SimpleNamespace(keys=lambda: names)

    monkeypatch.setattr("qwq_mlx.convert.finalize.safe_open", safe_open)
    convert_into(
        source, source.parent / "out", rf"model-00001-of-00001\.safetensors: the safetensors package {message}"
    )
    assert not (source.parent / "out").exists()
