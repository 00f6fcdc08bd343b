"""Sources that mlx-lm and transformers take though something is odd: converted, and what was ignored is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes, write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import LoadError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.header import read_header
from qwq_mlx.files.manifest import read_manifest, verify_full
from qwq_mlx.model.load import load_model

OUTPUT = "model-00001-of-00001.safetensors"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture
def source(known_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(known_checkpoint, tmp_path / "source"))


@pytest.fixture(scope="module")
def plain_bytes(known_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("plain") / "out"
    convert_checkpoint(known_checkpoint, folder)
    return (folder / OUTPUT).read_bytes()


def edit(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(source: Path) -> Tensors:
    return {
        name: (entry.dtype, entry.shape, header.path.read_bytes()[entry.start : entry.end])
        for name, (header, entry) in open_checkpoint(source).tensors.items()
    }


def rewrite(source: Path, values: Tensors) -> None:
    """One shard of these tensors, in this order."""
    for path in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        path.unlink()
    (source / "model.safetensors").write_bytes(safetensors_bytes(values))


def with_inv_freq(source: Path) -> None:
    """Before, between and behind the tensors that are read, so every gap is hashed."""
    one = ("F32", (16,), np.arange(16, dtype="<f4").tobytes())
    old = list(tensors(source).items())
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    rewrite(source, dict([(names[0], one), *old[:9], (names[1], one), *old[9:], (names[2], one)]))


def with_adapter(source: Path) -> None:
    (source / "adapter_model.safetensors").write_bytes(safetensors_bytes({"a": ("BF16", (1,), b"\0\0")}))


def single_with_adapter(source: Path) -> None:
    rewrite(source, tensors(source))
    with_adapter(source)


def with_whole_model(source: Path) -> None:
    (source / "model.safetensors").write_bytes(safetensors_bytes(tensors(source)))


def with_prefix(prefix: str) -> Callable[[Path], None]:
    """Another prefix in every name; the output matrix has what of it stands before "model."."""

    def change(source: Path) -> None:
        head = prefix.removesuffix("model.") if prefix.endswith("model.model.") else ""
        renamed = {
            prefix + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
            for name, tensor in tensors(source).items()
        }
        rewrite(source, renamed)

    return change


def with_bom(source: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())


def config(**changes: object) -> Callable[[Path], None]:
    return lambda source: edit(source, **changes)


CASES: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "inv_freq buffers": (with_inv_freq, r"ignored 3 inv_freq buffers"),
    "an adapter": (with_adapter, r"ignored adapter_model\.safetensors, read model-00001"),
    "an adapter beside one shard": (single_with_adapter, None),
    "the whole model beside its shards": (with_whole_model, r"ignored model\.safetensors, read model-00001"),
    "another torch_dtype": (
        config(torch_dtype="float16"),
        r"torch_dtype 'float16' is ignored: the tensors are bfloat16",
    ),
    "torch_dtype auto": (config(torch_dtype="auto"), None),
    "torch_dtype as torch writes it": (config(torch_dtype="torch.bfloat16"), None),
    "rope_scaling default": (config(rope_scaling={"type": "default", "rope_theta": 1e6}), None),
    "rope_scaling by one": (config(rope_scaling={"rope_type": "linear", "factor": 1.0}), None),
    "quantization_config null": (config(quantization_config=None), None),
    "quantization_config empty": (config(quantization_config={}), None),
    "quantization_config left over": (
        config(quantization_config={"quant_method": "bitsandbytes"}),
        r"quantization_config is ignored: every tensor holds plain floats",
    ),
    "a byte order mark": (with_bom, None),
    "names of PEFT": (with_prefix("base_model.model.model."), r"begin with 'base_model\.model\.model\.', which is"),
    "names of a model with pictures": (with_prefix("model.language_model."), r"begin with 'model\.language_model\.'"),
    "names without a prefix": (with_prefix(""), r"names of tensors begin with '', which is read as 'model\.'"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_odd_source_gives_the_bytes_of_the_plain_one(
    source: Path, tmp_path: Path, plain_bytes: bytes, name: str
) -> None:
    change, warning = CASES[name]
    change(source)
    warnings = convert_checkpoint(source, tmp_path / "out").warnings
    if warning is not None:
        (found,) = warnings
        assert re.search(warning, found)
    elif name != "an adapter beside one shard":
        assert warnings == ()
    assert sorted(tensors(tmp_path / "out").items()) == sorted(_tensors_of(plain_bytes, tmp_path).items())
    verify_full(tmp_path / "out")
    assert load_model(tmp_path / "out").warnings == ()
    assert set(open_checkpoint(source).warnings) <= set(load_model(source).warnings) <= set(warnings)


def _tensors_of(raw: bytes, tmp_path: Path) -> Tensors:
    (tmp_path / "plain.safetensors").write_bytes(raw)
    header = read_header(tmp_path / "plain.safetensors")
    return {name: (each.dtype, each.shape, raw[each.start : each.end]) for name, each in header.tensors.items()}


def test_the_shard_is_hashed_with_what_was_ignored(source: Path, tmp_path: Path) -> None:
    with_inv_freq(source)
    convert_checkpoint(source, tmp_path / "out")
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert read_manifest(tmp_path / "out").source.files["model.safetensors"].sha256 == digest


def test_a_tied_output_matrix_that_is_the_embedding_is_ignored(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tie=True)
    convert_checkpoint(source, tmp_path / "plain")
    values = tensors(source)
    rewrite(source, {**values, "lm_head.weight": values["model.embed_tokens.weight"]})
    warnings = convert_checkpoint(source, tmp_path / "out").warnings
    assert "ignored lm_head.weight: config.json has tie_word_embeddings true" in warnings[0]
    assert tensors(tmp_path / "out") == tensors(tmp_path / "plain")


def test_tensors_of_two_types_keep_them(source: Path, tmp_path: Path) -> None:
    values = tensors(source)
    for name, (_, shape, raw) in list(values.items()):
        if "norm" in name:
            wide = (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
            values[name] = ("F32", shape, wide)
    rewrite(source, values)
    (warning,) = convert_checkpoint(source, tmp_path / "out").warnings
    assert "5 of F32 among 22 tensors of BF16; each keeps its type" in warning
    written = tensors(tmp_path / "out")
    assert {name: written[name] for name in values if "norm" in name} == {
        n: v for n, v in values.items() if "norm" in n
    }
    load_model(tmp_path / "out")


def test_two_values_of_rope_theta_are_refused(source: Path, tmp_path: Path) -> None:
    edit(source, rope_scaling={"type": "default", "rope_theta": 10000.0})
    with pytest.raises(LoadError, match=r"rope_theta is 1000000\.0, but rope_scaling says 10000\.0"):
        convert_checkpoint(source, tmp_path / "out")


def test_names_of_two_kinds_are_not_guessed(source: Path) -> None:
    with_prefix("model.language_model.")(source)
    read = {
        header.names_in_file[name]: (entry.dtype, entry.shape, header.path.read_bytes()[entry.start : entry.end])
        for name, (header, entry) in open_checkpoint(source).tensors.items()
    }
    rewrite(source, {**read, "model.visual.weight": ("BF16", (2, 2), bytes(8))})
    with pytest.raises(LoadError, match=r"unknown: model\.language_model\..*"):
        load_model(source)
