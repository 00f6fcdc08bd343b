"""Conversions of GGUF files: codes that stay, refits, types of scales, and every promise of a conversion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import encode_floats, safetensors_bytes, write_tiny_checkpoint
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_files import entry_of, gguf_bytes, metadata_of, weights_of, write_gguf

from qwq_mlx.compare.table import compare_models
from qwq_mlx.convert import ConvertProgress, convert_checkpoint
from qwq_mlx.convert.__main__ import main
from qwq_mlx.errors import ConversionError, OptionError, SourceError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.gguf.header import read_gguf_header
from qwq_mlx.files.manifest import read_manifest, verify_full
from qwq_mlx.files.rows import read_rows
from qwq_mlx.fit.__main__ import main as fit
from qwq_mlx.model.layout import packings
from qwq_mlx.model.load import load_model
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.quant.packing import DTYPES, Packed, float_values
from qwq_mlx.quant.rounding_error import unpack
from qwq_mlx.verify.check import verify_conversion

KINDS = {
    "token_embd": "Q4_K",
    "output": "Q6_K",
    "attn_q": "Q5_K",
    "attn_k": "Q8_0",
    "attn_v": "Q4_1",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q5_1",
    "ffn_down": "Q2_K",
}
REFITTED = ("lm_head", "mlp.down_proj")


def kind_of(name: str) -> str:
    return KINDS[name.split(".")[-2]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 weights and more, as the K types need them."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "source", hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with a type of each kind."""
    return write_gguf(checkpoint, tmp_path_factory.mktemp("mixed") / "mixed.gguf", kind_of)


@pytest.fixture(scope="module")
def decoded(mixed: Path) -> dict[str, np.ndarray]:
    """Its weights, by the gguf package, under the names of the Hub."""
    return decode(mixed)


def decode(path: Path) -> dict[str, np.ndarray]:
    from qwq_mlx.files.gguf.checkpoint import opened_gguf
    from qwq_mlx.files.gguf.stores import GgufFile

    raw, tensors = path.read_bytes(), read_gguf_header(path).tensors
    with opened_gguf(GgufFile(path=path, label=path.name)) as source:
        names = {ours: theirs for shard in source.shards for ours, theirs in shard.names_in_file.items()}
    return {
        ours: dequantize(
            np.frombuffer(raw[each.start : each.end], np.uint8).reshape(*each.shape[:-1], -1)
            if each.type.name not in ("F32", "F16")
            else np.frombuffer(raw[each.start : each.end], "<f4" if each.type.name == "F32" else "<f2"),
            GGMLQuantizationType[each.type.name],
        ).reshape(each.shape)
        for ours, theirs in names.items()
        for each in (tensors[theirs],)
    }


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """A conversion's weights, unpacked in float32."""
    files = open_checkpoint(folder)
    from qwq_mlx.model.architecture import Qwen2Config

    config = Qwen2Config.from_json(files.config, where="config.json")
    packed = packings(files.config, config, files.tensors, where="config.json")

    def raw(name: str) -> tuple[np.ndarray, str]:
        shard, entry = files.tensors[name]
        dtype = np.dtype("<u4") if entry.dtype == "U32" else DTYPES[entry.dtype]
        return read_rows(shard, entry).view(dtype).reshape(entry.shape), entry.dtype

    values = {}
    for name in files.tensors:
        path, _, kind = name.rpartition(".")
        if path in packed and kind == "weight":
            scales, dtype = raw(f"{path}.scales")
            matrix = Packed(raw(name)[0], scales, raw(f"{path}.biases")[0])
            values[name] = unpack(matrix, packed[path], dtype, stream=None)
        elif kind in ("weight", "bias"):
            values[name] = float_values(*raw(name))
    return values


def test_a_gguf_of_bfloat16_gives_the_bytes_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", "BF16")
    convert_checkpoint(checkpoint, tmp_path / "plain")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    plain, ours = read_manifest(tmp_path / "plain"), verify_full(tmp_path / "out")
    assert {name: each.sha256 for name, each in ours.tensors.items()} == {
        name: each.sha256 for name, each in plain.tensors.items()
    }
    assert (ours.recipe, ours.fit) == (plain.recipe, plain.fit)


def test_codes_stay_and_float32_scales_are_exact(mixed: Path, decoded: dict[str, np.ndarray], tmp_path: Path) -> None:
    done = convert_checkpoint(mixed, tmp_path / "out", scale_dtype="float32")
    values, manifest = values_of(tmp_path / "out"), verify_full(tmp_path / "out")
    assert values.keys() == decoded.keys()
    for name, expected in decoded.items():
        record = manifest.tensors[name]
        if name.removesuffix(".weight").endswith(REFITTED):
            assert 1e-3 < record.relative_error < 0.3
        else:
            assert np.array_equal(values[name], expected), name
            assert not record.relative_error
    assert manifest.gguf is not None
    assert manifest.gguf["scale_dtype"] == "F32"
    assert manifest.gguf["tensors"]["lm_head.weight"] == {"type": "Q6_K", "is_repacked": False}
    assert manifest.gguf["tensors"]["model.embed_tokens.weight"] == {"type": "Q4_K", "is_repacked": True}
    sha256 = hashlib.sha256(mixed.read_bytes()).hexdigest()
    assert {name: each.sha256 for name, each in manifest.source.files.items()} == {"mixed.gguf": sha256}
    assert done.relative_error is not None
    assert 0 < done.relative_error < 0.3


@pytest.mark.parametrize(("scale_dtype", "most"), [(None, 7e-3), ("float16", 4e-4)])
def test_16_bit_scales_add_an_error_that_is_reported(
    mixed: Path, decoded: dict[str, np.ndarray], tmp_path: Path, scale_dtype: str | None, most: float
) -> None:
    convert_checkpoint(mixed, tmp_path / "out", scale_dtype=scale_dtype)
    values, manifest = values_of(tmp_path / "out"), read_manifest(tmp_path / "out")
    for name, expected in decoded.items():
        actual = np.linalg.norm(values[name] - expected) / np.linalg.norm(expected)
        reported = manifest.tensors[name].relative_error or 0.0
        assert reported == pytest.approx(actual, rel=1e-3, abs=1e-9)
        if not name.removesuffix(".weight").endswith(REFITTED):
            assert actual < most
    dtypes = {name: each.dtype for name, each in manifest.tensors.items()}
    if scale_dtype is None:
        assert set(dtypes.values()) == {"U32", "BF16"}
    else:  # no program is led to compute in float16: the embedding says the type
        assert dtypes["model.embed_tokens.scales"] == dtypes["model.norm.weight"] == "F32"
        assert dtypes["model.layers.0.self_attn.q_proj.biases"] == "F16"


def test_the_error_of_a_refit_counts_from_the_decoded_weights(
    mixed: Path, decoded: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Under a recipe that names other groups every matrix is fitted anew, by least squares and by min-max alike."""
    for recipe in ("4bit", "4bit-min-max", "mxfp4"):
        convert_checkpoint(mixed, tmp_path / recipe, recipe=recipe)
        manifest = read_manifest(tmp_path / recipe)
        assert manifest.gguf is not None
        assert not any(each["is_repacked"] for each in manifest.gguf["tensors"].values())
        if recipe == "mxfp4":
            continue
        values = values_of(tmp_path / recipe)
        for name, expected in decoded.items():
            actual = np.linalg.norm(values[name] - expected) / np.linalg.norm(expected)
            assert manifest.tensors[name].relative_error or actual == 0
            assert manifest.tensors[name].relative_error == pytest.approx(actual, rel=1e-3) or actual == 0


def test_a_recipe_of_the_very_packing_keeps_the_codes(mixed: Path, tmp_path: Path) -> None:
    convert_checkpoint(mixed, tmp_path / "out", recipe="4bit-g32")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.gguf is not None
    kept = {each["type"] for each in manifest.gguf["tensors"].values() if each["is_repacked"]}
    assert kept == {"Q4_0", "Q4_1", "Q4_K"}


@pytest.mark.parametrize(("scale_dtype", "computed"), [(None, mx.bfloat16), ("float16", mx.float32)])
def test_mlx_lm_loads_it_and_never_computes_in_float16(
    mixed: Path, tmp_path: Path, scale_dtype: str | None, computed: mx.Dtype
) -> None:
    """Bits of five widths and groups of two sizes; in float32 both programs have the very same logits."""
    from mlx_lm.utils import load_model as load_by_mlx_lm

    convert_checkpoint(mixed, tmp_path / "out", scale_dtype=scale_dtype)
    theirs, _ = load_by_mlx_lm(tmp_path / "out")
    ids = mx.array([[1, 2, 3]])
    assert theirs.model(ids).dtype == computed
    if computed == mx.float32:
        ours = load_model(tmp_path / "out", compute_type="float32").module(ids, None)
        assert mx.array_equal(ours, theirs(ids))


@pytest.mark.pocket
def test_the_pocket_model_says_the_same_from_a_gguf_as_from_its_decoded_weights(
    repository: Path, tmp_path: Path
) -> None:
    """Greedy ids, out of Q8_0 with float32 scales, against a float32 checkpoint of what the gguf package decodes."""
    from qwq_mlx.generate.reasoner import load

    pocket = repository / "qwq_mlx/pocket/checkpoint"
    gguf = write_gguf(pocket, tmp_path / "pocket.gguf", lambda name: "Q4_0" if "ffn" in name else "Q8_0")
    convert_checkpoint(gguf, tmp_path / "out", scale_dtype="float32", quality=False)
    tensors = {name: ("F32", each.shape, encode_floats(each, "F32")) for name, each in decode(gguf).items()}
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (reference / name).write_bytes((pocket / name).read_bytes())
    question, limits = "5 * (2 + 7) = ?", Limits(max_tokens=80)
    ids = [
        load(folder).generate(question, sampling=Sampling(temperature=0.0), limits=limits).ids
        for folder in (tmp_path / "out", reference)
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 20


def test_an_interrupted_conversion_goes_on(mixed: Path, tmp_path: Path) -> None:
    def press(progress: ConvertProgress) -> None:
        if progress.phase == "convert" and progress.done_bytes > 0.5 * progress.total_bytes:
            raise KeyboardInterrupt

    convert_checkpoint(mixed, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(mixed, tmp_path / "out", progress=press)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match=r"holds an unfinished conversion of something else:\n  layout"):
        convert_checkpoint(mixed, tmp_path / "out", scale_dtype="float32")
    resumed = convert_checkpoint(mixed, tmp_path / "out")
    assert resumed.resumed_bytes > 0.3 * resumed.source_bytes
    whole = tmp_path / "whole/model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / whole.name).read_bytes() == whole.read_bytes()


def test_ollamas_digest_is_compared_before_anything_is_published(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(mixed.read_bytes()).hexdigest()
    blob = tmp_path / f"blobs/sha256-{sha256}"
    manifest = tmp_path / "manifests/registry.ollama.ai/library/qwq/32b"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    blob.write_bytes(mixed.read_bytes())
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{sha256}",
        "size": mixed.stat().st_size,
    }
    manifest.write_text(json.dumps({"layers": [layer]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    convert_checkpoint("ollama:qwq:32b", tmp_path / "good")
    record = read_manifest(tmp_path / "good")
    assert record.gguf is not None
    assert (record.gguf["label"], record.gguf["name"]) == ("ollama:qwq:32b", "A Small Model")
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(
        SourceError, match=r"^ollama:qwq:32b: .* has the sha256 .*, its name says .* nothing was published"
    ):
        convert_checkpoint("ollama:qwq:32b", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_quality_is_measured_against_the_decoded_weights(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Wait, the answer is so and so. " * 8)
    exact = convert_checkpoint(mixed, tmp_path / "f32", scale_dtype="float32", quality=tmp_path / "text.txt")
    coarse = convert_checkpoint(mixed, tmp_path / "2bit", recipe="2bit", quality=tmp_path / "text.txt")
    assert exact.kl is not None and coarse.kl is not None
    assert 0 <= exact.kl < coarse.kl / 10


def test_a_calibration_text_fits_what_cannot_keep_its_codes(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Wait, the answer is so and so. " * 80)
    for name, calibrate in (("plain", None), ("calibrated", tmp_path / "text.txt")):
        convert_checkpoint(mixed, tmp_path / name, calibrate=calibrate)
    plain, calibrated = (read_manifest(tmp_path / name).tensors for name in ("plain", "calibrated"))
    differing = {name.removesuffix(".weight") for name in plain if plain[name].sha256 != calibrated[name].sha256}
    matrices = {each for each in differing if not each.endswith((".scales", ".biases"))}
    assert matrices and all(each.endswith(REFITTED) for each in matrices)


def test_a_target_size_and_a_float16_file_are_converted_as_any_source(checkpoint: Path, tmp_path: Path) -> None:
    gguf = write_gguf(checkpoint, tmp_path / "model.gguf", "F16")
    done = convert_checkpoint(gguf, tmp_path / "out", target_bytes=500_000)
    assert 400_000 < done.output_bytes <= 500_000
    kept = tmp_path / "keep.toml"
    kept.write_text('[weights]\nbits = 4\n[[override]]\nmatch = "lm_head"\nkeep = true\n')
    convert_checkpoint(gguf, tmp_path / "kept", recipe=kept)
    assert read_manifest(tmp_path / "kept").tensors["lm_head.weight"].dtype == "BF16"
    assert load_model(tmp_path / "kept").config.vocab_size == 320


def test_an_option_that_has_no_meaning_is_refused(checkpoint: Path, mixed: Path, tmp_path: Path) -> None:
    all_kept, text = write_gguf(checkpoint, tmp_path / "kept.gguf", "Q8_0"), tmp_path / "text.txt"
    text.write_text("Wait, the answer is so and so. " * 80)
    refusals: list[tuple[Path, dict[str, Any], str]] = [
        (
            checkpoint,
            {"scale_dtype": "float32"},
            "scale_dtype is 'float32', but .* is no GGUF: its scales get the type",
        ),
        (mixed, {"scale_dtype": "int8"}, "scale_dtype is 'int8', expected one of bfloat16, float16, float32"),
        (
            all_kept,
            {"calibrate": text},
            "calibrate is 'text.txt', but every matrix of .*kept.gguf keeps its codes, .* Leave `calibrate` out, or",
        ),
        (mixed, {"revision": "main"}, "revision is 'main', which only a repository of the Hub has, but .* is a GGUF"),
    ]
    for source, options, message in refusals:
        with pytest.raises(OptionError, match=message):
            convert_checkpoint(source, tmp_path / "out", **options)
        assert sorted(tmp_path.iterdir()) == [all_kept, text]


def test_a_not_a_number_in_a_block_is_named(mixed: Path, tmp_path: Path) -> None:
    raw, header = bytearray(mixed.read_bytes()), read_gguf_header(mixed)
    start = header.tensors["blk.1.ffn_gate.weight"].start
    raw[start + 18 * 8 : start + 18 * 8 + 2] = np.float16(np.nan).tobytes()  # the first block of row 1
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(
        ConversionError,
        match=r"nan.gguf: tensor model.layers.1.mlp.gate_proj.weight: the weight at row 1, column 0 is NaN",
    ):
        convert_checkpoint(tmp_path / "nan.gguf", tmp_path / "out")


def test_weights_too_large_for_float16_scales_are_named(checkpoint: Path, tmp_path: Path) -> None:
    weights = weights_of(checkpoint)
    weights["blk.0.ffn_down.weight"][0, 0] = 76_000  # 128 scales of 598: no float16
    tensors = {name: entry_of(each, "F32" if each.ndim == 1 else "Q8_0") for name, each in weights.items()}
    (tmp_path / "large.gguf").write_bytes(gguf_bytes(metadata_of(checkpoint), tensors))
    with pytest.raises(ConversionError, match=r"mlp.down_proj.weight: has weights too large for scales .* in F16"):
        convert_checkpoint(tmp_path / "large.gguf", tmp_path / "out", scale_dtype="float16")
    convert_checkpoint(tmp_path / "large.gguf", tmp_path / "out", scale_dtype="float32", quality=False, restart=True)
    assert read_manifest(tmp_path / "out").tensors["model.layers.0.mlp.down_proj.weight"].relative_error == 0


def test_the_command_says_what_is_kept_and_what_is_fitted_anew(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["--source", str(mixed), "--output", str(tmp_path / "out"), "--dry-run", "--scale-dtype", "float16"]) == 0
    )
    out, err = capsys.readouterr()
    assert "source  mixed.gguf (A Small Model): 1 shards, 27 tensors" in out
    assert "gguf    13 matrices keep their codes (" in out and "2 of Q5_K" in out and "1 of Q4_K" in out
    assert "3 are fitted anew (2 of Q2_K to 3 bits, 1 of Q6_K to 6 bits); scales in float16" in out
    assert "warning: the chat template (sha256 " in err


def test_the_gguf_of_a_damaged_download_leaves_nothing_behind(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.gguf").write_bytes(mixed.read_bytes()[:-1000])
    assert main(["--source", str(tmp_path / "cut.gguf"), "--output", str(tmp_path / "out")]) == 1
    assert "ends 1,000 bytes early" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_every_vector_that_bfloat16_cannot_hold_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    from gguf_files import gguf_bytes, metadata_of

    tensors = {
        name: entry_of(each, "F32" if each.ndim == 1 else "Q8_0") for name, each in weights_of(checkpoint).items()
    }
    tensors["output_norm.weight"] = entry_of(np.full(256, 1.001, np.float32), "F32")
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(metadata_of(checkpoint), tensors))
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    error = read_manifest(tmp_path / "out").tensors["model.norm.weight"].relative_error
    assert error == pytest.approx(0.001 / 1.001, rel=1e-4)


def test_verify_packs_it_again_from_the_gguf(mixed: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Wait, the answer is so and so. " * 80)
    for name, options in (("plain", {"scale_dtype": "float16"}), ("calibrated", {"calibrate": tmp_path / "text.txt"})):
        convert_checkpoint(mixed, tmp_path / name, **options)
        assert len(verify_conversion(tmp_path / name, source=mixed, n_tensors=27).packed_again) == 27
    changed = bytearray(mixed.read_bytes())
    start = read_gguf_header(mixed).tensors["blk.0.ffn_gate.weight"].start
    changed[start + 5] ^= 16  # a code
    (tmp_path / "changed.gguf").write_bytes(changed)
    with pytest.raises(SourceError, match=r"1 of 27 tensors packed again from .*changed.gguf have other bytes: mode"):
        verify_conversion(tmp_path / "plain", source=tmp_path / "changed.gguf", n_tensors=27)
    with pytest.raises(SourceError, match=r"tensors are not those that .* leads to"):
        verify_conversion(tmp_path / "plain", source=checkpoint, n_tensors=27)


def test_compare_measures_a_conversion_against_the_gguf(mixed: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Wait, the answer is so and so. " * 8)
    write_gguf(checkpoint, tmp_path / "q8.gguf", "Q8_0")
    convert_checkpoint(mixed, tmp_path / "out", scale_dtype="float32", recipe="8bit")
    rows = compare_models([mixed, tmp_path / "out", tmp_path / "q8.gguf"], text=tmp_path / "text.txt").rows
    assert [row.folder.name for row in rows] == ["mixed.gguf", "out", "q8.gguf"]
    assert "q4_k" in rows[0].weights and rows[0].size_bytes < mixed.stat().st_size
    kl = [row.quality.kl for row in rows[1:] if row.quality is not None]
    assert 0 <= kl[0] < 0.01 < kl[1]  # random K blocks are another model than the checkpoint that Q8_0 was made of


def test_fit_plans_the_conversion_from_the_header(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_checkpoint(mixed, tmp_path / "out")
    plans = []
    for model in (mixed, tmp_path / "out"):
        assert fit(["--model", str(model), "--ram", "32", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0].pop("model") == "mixed.gguf, converted by its own types"
    assert plans[1].pop("model") == str(tmp_path / "out")
    assert plans[0] == plans[1]
