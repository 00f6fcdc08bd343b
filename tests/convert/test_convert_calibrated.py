"""Calibration: layers fitted to what they are fed with, that a resumed run keeps them, what verifies them; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from hub_server import HubServer, Repository

from qwq_mlx.convert import ConvertProgress, convert_checkpoint, finalize
from qwq_mlx.convert import plan as planning
from qwq_mlx.convert.__main__ import main
from qwq_mlx.convert.calibration import fit_layers
from qwq_mlx.convert.calibration import text as module
from qwq_mlx.convert.calibration.input_products import InputProducts
from qwq_mlx.convert.calibration.text import read_calibration
from qwq_mlx.convert.preflight import check_fit
from qwq_mlx.errors import ConversionError, OptionError, SourceError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.manifest import read_manifest, write_manifest
from qwq_mlx.generate.__main__ import main as generate
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.layers import LayerStream
from qwq_mlx.model.load import load_model
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quant.error_feedback import factor_moments, fit_rows
from qwq_mlx.quant.float_targets import float_targets
from qwq_mlx.quant.recipe import load_recipe
from qwq_mlx.verify.check import verify_conversion

pytestmark = pytest.mark.tiny
TEXT = "wait, is the answer 479? let me think again. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def config_of(folder: Path) -> Qwen2Config:
    return Qwen2Config.from_json(open_checkpoint(folder).config, where="config.json")


def calibrated(folder: Path, path: Path) -> module.Calibration:
    return read_calibration(path, open_checkpoint(folder), config_of(folder))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array(a.view(mx.uint8))
        for p in folder.glob("model*")
        if p.suffix == ".safetensors"
        for name, a in mx.load(str(p)).items()
    }


def inputs_of(folder: Path, calibration: module.Calibration) -> dict[str, np.ndarray]:
    """What some matrices are fed with over the text, (positions, in), float64, by the whole model's own code."""
    model = load_model(folder)
    inner: Any = model.module.model
    found: dict[str, list[np.ndarray]] = {"layers.0.q": [], "lm_head": []}
    for ids in calibration.texts:
        x = inner.embed_tokens(mx.array([list(ids)]))
        found["layers.0.q"].append(np.array(inner.layers[0].input_layernorm(x)[0].astype(mx.float32)))
        found["lm_head"].append(np.array(inner(mx.array([list(ids)]))[0].astype(mx.float32)))
    return {name: np.concatenate(parts).astype(float) for name, parts in found.items()}


def source_weight(folder: Path, name: str) -> np.ndarray:
    stream = LayerStream(open_model_folder(folder, follow_links=True), compute_type="float32", unpack=True)
    if "layers" not in name:
        return np.concatenate([np.array(block.rows.whole()) for block in stream.head().blocks()])
    return np.array(stream._matrix(name, None).whole())


@pytest.fixture(scope="module")
def converted(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated conversion of the tiny checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    convert_checkpoint(tiny_checkpoint, folder / "out", calibrate=folder / "text.txt", quality=False)
    return folder / "out"


@pytest.mark.parametrize("is_toward_float", [False, True])
def test_matrices_are_fitted_to_what_the_layers_before_as_packed_feed_them_with(
    tiny_checkpoint: Path,
    converted: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_toward_float: bool,
) -> None:
    """And, by a text that is long enough, so that they give what the float model gives there."""
    if is_toward_float:
        monkeypatch.setattr(module, "MIN_IDS_TOWARD_FLOAT", 512)
        converted = tmp_path / "out"
        convert_checkpoint(tiny_checkpoint, converted, calibrate=text, quality=False)
    calibration = calibrated(tiny_checkpoint, text)
    assert calibration.n_ids >= 512 and max(map(len, calibration.texts)) == 512
    packing = load_recipe("4bit").packing
    by_packed, by_float = inputs_of(converted, calibration), inputs_of(tiny_checkpoint, calibration)
    for fed_as, names in (
        ("layers.0.q", [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]),
        ("lm_head", ["lm_head"]),
    ):
        x, float_x = by_packed[fed_as], by_float[fed_as]
        moments = factor_moments([x.T @ x / len(x)])
        drift = (((float_x - x).T @ x) / len(x)).astype(np.float32)
        assert np.abs(drift).max() > 1e-4  # the packed embedding's, in the first layer
        for path in names:
            source = source_weight(tiny_checkpoint, path)
            targets = float_targets(source, moments.uppers, [drift]) if is_toward_float else source
            packed = fit_rows(targets, moments, packing, "BF16")
            ours = weights(converted)[f"{path}.weight"]
            assert (ours != packed.codes.view(np.uint8)).mean() < 0.04  # sums in another order: a code now and then


def test_outputs_lose_less_than_by_the_fit_of_the_weights_and_the_manifest_says_how(
    tiny_checkpoint: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    plain, phases = tmp_path / "plain", []
    convert_checkpoint(tiny_checkpoint, plain, recipe="4bit", quality=False)
    calibration = calibrated(tiny_checkpoint, text)
    fed = inputs_of(tiny_checkpoint, calibration)["layers.0.q"]
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        source = source_weight(tiny_checkpoint, path)
        ours, theirs = (((source_weight(f, path) - source) @ fed.T).var() for f in (converted, plain))
        assert ours < 0.7 * theirs
    manifest = read_manifest(converted)
    assert manifest.fit == "calibrated" and manifest.calibration == calibration.as_mapping()
    assert read_manifest(plain).calibration is None
    assert (
        sum(p.stat().st_size for p in converted.iterdir())
        == sum(p.stat().st_size for p in plain.iterdir())
        + (converted / "manifest.json").stat().st_size
        - (plain / "manifest.json").stat().st_size
    )
    assert np.array_equal(weights(plain)["model.embed_tokens.weight"], weights(converted)["model.embed_tokens.weight"])
    one = convert_checkpoint(
        tiny_checkpoint, tmp_path / "one", calibrate=text, n_workers=1, progress=lambda each: phases.append(each.phase)
    )
    assert phases[0] == "calibrate" and "convert" in phases
    same = weights(one.output)
    assert all(np.array_equal(array, same[name]) for name, array in weights(converted).items())


def test_a_recipe_with_matrices_kept_and_a_tied_head_is_calibrated_too(text: Path, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tie=True)
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        '[weights]\nbits = 3\n[[override]]\nmatch = ["*.v_proj"]\nkeep = true\n'
        '[[override]]\nmatch = ["*.o_proj"]\nbits = 6\ngroup_size = 32\n'
    )
    done = convert_checkpoint(source, tmp_path / "out", recipe=recipe, calibrate=text, quality=False)
    found = weights(done.output)
    assert "model.layers.0.self_attn.v_proj.scales" not in found
    assert found["model.layers.0.self_attn.o_proj.scales"].shape[1] == 2 * 128 // 32
    plain = convert_checkpoint(source, tmp_path / "plain", recipe=recipe, quality=False)
    assert not np.array_equal(weights(plain.output)["model.embed_tokens.weight"], found["model.embed_tokens.weight"])
    load_model(done.output)


@pytest.mark.parametrize("kept", [["*"], ["model.layers.*", "lm_head"]])
def test_a_recipe_that_packs_nothing_that_the_text_is_fed_to_is_refused(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, kept: list[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"[weights]\nbits = 4\n[[override]]\nmatch = {json.dumps(kept)}\nkeep = true\n")
    with pytest.raises(OptionError, match=r"calibrate is 'text.txt', but own packs no matrix of .* anew that .* Leave"):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", recipe=recipe, calibrate=text, dry_run=True)


def test_a_resumed_run_reads_what_the_first_one_collected_and_another_text_is_refused(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    convert_checkpoint(tiny_checkpoint, whole, calibrate=text)

    def stop(progress: ConvertProgress) -> None:
        if progress.phase == "convert" and progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_checkpoint, output, calibrate=text, progress=stop)
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "no.", encoding="utf-8")
    with pytest.raises(ConversionError, match=r"calibration\.sha256: was '.*', is '"):
        convert_checkpoint(tiny_checkpoint, output, calibrate=other)
    with pytest.raises(ConversionError, match=r"calibration: was \{.*, is nothing"):
        convert_checkpoint(tiny_checkpoint, output)
    with monkeypatch.context() as patch:
        patch.setattr(finalize, "backend_name", lambda: "cuda")
        with pytest.raises(ConversionError, match=r"calibration\.backend: was 'cpu', is 'cuda'"):
            convert_checkpoint(tiny_checkpoint, output, calibrate=text)
    monkeypatch.setattr(fit_layers._Pass, "run", lambda *_: pytest.fail("run again"))
    conversion = convert_checkpoint(tiny_checkpoint, output, calibrate=text)
    assert conversion.resumed_bytes > 0
    ours, theirs = weights(output), weights(whole)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("damage", ["layer-00001", "another run"])
def test_what_is_torn_or_of_another_run_is_fitted_again(
    tiny_checkpoint: Path, converted: Path, text: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "out"

    def stop(progress: ConvertProgress) -> None:
        if progress.phase == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_checkpoint, output, calibrate=text, quality=False, progress=stop)
    folder, phases = tmp_path / "out.partial" / "calibration", []
    assert sorted(path.name for path in folder.iterdir())[-1] == "output.safetensors"
    for path in folder.iterdir():
        data = path.read_bytes()
        if damage == "another run":
            path.write_bytes(data.replace(b"text.txt", b"next.txt"))
        elif path.stem == damage:
            path.write_bytes(data[:-9])
    convert_checkpoint(
        tiny_checkpoint, output, calibrate=text, quality=False, progress=lambda each: phases.append(each.phase)
    )
    assert "calibrate" in phases
    ours, theirs = weights(output), weights(converted)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_calibrated_conversion_is_verified_by_the_errors_of_its_matrices(
    tiny_checkpoint: Path, converted: Path, tmp_path: Path
) -> None:
    verified = verify_conversion(converted, source=tiny_checkpoint, full=True, n_tensors=99)
    assert len(verified.packed_again) == len(open_checkpoint(tiny_checkpoint).tensors)
    other = write_tiny_checkpoint(tmp_path / "other", seed=3)
    with pytest.raises(
        SourceError, match=r"tensors packed again from .*other have other bytes or errors: lm_head\.weig"
    ):
        verify_conversion(converted, source=other, n_tensors=99)
    shutil.copytree(converted, tmp_path / "edited")
    manifest = read_manifest(converted)
    tensors = dict(manifest.tensors)
    path = "model.layers.1.mlp.down_proj.weight"
    tensors[path] = replace(tensors[path], relative_error=1.001 * (tensors[path].relative_error or 0.0))
    write_manifest(tmp_path / "edited", replace(manifest, tensors=tensors))
    with pytest.raises(
        SourceError, match=rf"1 of \d+ tensors .* other bytes or errors: {path}\. The conversion is not"
    ):
        verify_conversion(tmp_path / "edited", source=tiny_checkpoint, n_tensors=99)


@pytest.fixture
def server(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.repositories["a/b"] = Repository()
        server.repositories["a/b"].push({path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()})
        yield server


def test_a_repository_whose_shards_stay_is_calibrated_with_every_shard_fetched_once(
    server: HubServer, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    phases: list[str] = []

    def stop(progress: ConvertProgress) -> None:
        phases.append(progress.phase)
        if progress.what.endswith("layers.1.self_attn.q_proj"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint("a/b", tmp_path / "out", calibrate=text, keep_source=True, progress=stop)
    assert "calibrate" in phases and (tmp_path / "out.source" / "config.json").is_file()
    fetched = server.n_bytes_sent
    convert_checkpoint("a/b", tmp_path / "out", calibrate=text, keep_source=True)
    shards = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert server.n_bytes_sent - fetched <= shards  # headers, which are whole files of this size; no shard again
    convert_checkpoint(tiny_checkpoint, tmp_path / "local", calibrate=text)
    ours, local = weights(tmp_path / "out"), weights(tmp_path / "local")
    assert all(np.array_equal(ours[name], local[name]) for name in local)
    assert len(verify_conversion(tmp_path / "out", source=tmp_path / "out.source").packed_again) == 8


def pushed(server: HubServer, folder: Path) -> Path:
    server.repositories["a/b"].push({path.name: path.read_bytes() for path in folder.iterdir()})
    return folder


def test_a_repository_whose_shards_are_dropped_passes_twice_with_two_shards_on_the_disk(
    server: HubServer, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pushed(server, write_tiny_checkpoint(tmp_path / "source", n_layers=4, n_shards=4))
    n_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    most, fetched = {"calibrate": 0, "convert": 0}, {"calibrate": 0, "convert": 0}

    def look(progress: ConvertProgress) -> None:
        if progress.phase in most:
            here = list((tmp_path / "out.partial" / "source").glob("*model-*"))
            most[progress.phase] = max(most[progress.phase], len(here))
            fetched[progress.phase] = progress.fetched_bytes or 0

    convert_checkpoint("a/b", tmp_path / "out", calibrate=text, progress=look)
    assert most["calibrate"] in (1, 2) and most["convert"] in (1, 2)
    assert fetched["convert"] == n_bytes and 0.5 * n_bytes < fetched["calibrate"] <= n_bytes
    convert_checkpoint(source, tmp_path / "local", calibrate=text)
    ours, local = weights(tmp_path / "out"), weights(tmp_path / "local")
    assert ours.keys() == local.keys() and all(np.array_equal(ours[name], local[name]) for name in local)
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out.source").exists()
    arguments = ["--source", "a/b", "--output", str(tmp_path / "two"), "--calibrate", str(text), "--dry-run"]
    assert main(arguments) == 0 and "the source is fetched twice, to calibrate and to pack" in capsys.readouterr().out
    assert main([*arguments, "--keep-source"]) == 0 and "fetched twice" not in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["calibrate", "convert"])
def test_a_run_that_was_stopped_in_either_pass_ends_with_the_same_bytes(
    phase: str, server: HubServer, text: Path, tmp_path: Path
) -> None:
    source = pushed(server, write_tiny_checkpoint(tmp_path / "source", n_layers=4, n_shards=4))

    def stop(progress: ConvertProgress) -> None:
        if progress.phase == phase and "layers.2" in progress.what:
            raise KeyboardInterrupt

    phases: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint("a/b", tmp_path / "out", calibrate=text, progress=stop)
    convert_checkpoint("a/b", tmp_path / "out", calibrate=text, progress=lambda each: phases.append(each.phase))
    assert ("calibrate" in phases) == (phase == "calibrate")  # what the first pass found is kept
    convert_checkpoint(source, tmp_path / "local", calibrate=text)
    ours, local = weights(tmp_path / "out"), weights(tmp_path / "local")
    assert all(np.array_equal(ours[name], local[name]) for name in local)


def test_shards_that_a_text_would_need_all_at_a_time_are_refused_before_one_is_fetched(
    server: HubServer, text: Path, tmp_path: Path
) -> None:
    source = pushed(server, write_tiny_checkpoint(tmp_path / "source", n_layers=1, n_shards=5))
    with pytest.raises(
        OptionError,
        match=r"calibrate is 'text\.txt': the text passes the layers one by one, and at model\.layers\.0 \d shards "
        r"would have to be on the disk \(model-0000\d-of-00005\.safetensors, .* 2 are there at a time\. Add `keep_s",
    ):
        convert_checkpoint("a/b", tmp_path / "out", calibrate=text)
    assert not list(tmp_path.glob("out*"))
    convert_checkpoint("a/b", tmp_path / "out", calibrate=text, keep_source=True)
    assert len(list((tmp_path / "out.source").glob("*.safetensors"))) == len(list(source.glob("*.safetensors")))


def test_jsonl_holds_texts_and_conversations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    question = [{"role": "user", "content": "how many r?"}]
    lines: list[dict[str, Any]] = [
        {"text": TEXT},
        {"messages": [*question, {"role": "assistant", "content": "three. " * 20}]},
        {"messages": question},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    calibration = calibrated(tiny_checkpoint, path)
    assert sum(len(ids) < 512 for ids in calibration.texts) >= 2
    assert calibration.texts[-2][: len(calibration.texts[-1])] == calibration.texts[-1]
    assert len(calibration.texts[-2]) > len(calibration.texts[-1])


def test_results_of_many_questions_calibrate_by_their_ids(tiny_checkpoint: Path, tmp_path: Path) -> None:
    n_asked = 6  # random weights: some outputs end early
    asked, results = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    asked.write_text("".join(json.dumps({"question": f"{n} + {n}?"}) + "\n" for n in range(n_asked)), encoding="utf-8")
    options = ["--model", str(tiny_checkpoint), "--input", str(asked), "--output", str(results)]
    assert generate([*options, "--max-tokens", "250", "--on-loop", "off"]) == 0
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    expected = [[*line["trace"]["prompt_ids"], *line["trace"]["ids"]] for line in lines]
    failed = {"index": n_asked, "run": lines[0]["run"], "error": "no memory"}
    results.write_text("\n".join(map(json.dumps, [*lines, failed])), encoding="utf-8")
    calibration = calibrated(tiny_checkpoint, results)
    assert list(calibration.texts) == [tuple(ids[at : at + 512]) for ids in expected for at in range(0, len(ids), 512)]

    a, b = load_tokenizer(tiny_checkpoint, vocab_size=config_of(tiny_checkpoint).vocab_size).hf.encode("ab")
    longest = max(range(n_asked), key=lambda n: len(lines[n]["trace"]["ids"]))
    written = lines[longest]["trace"]["ids"]
    written[0] = b if written[0] == a else a  # as if another tokenizer had written it
    results.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(OptionError, match=rf"results\.jsonl, line {longest + 1}: was written with another vocabulary"):
        calibrated(tiny_checkpoint, results)
    for fields, message in (
        ({"trace": lines[0]["trace"] | {"ids": [1 << 20] * 5}}, "line 1: "),
        ({"trace": 3}, "line 1: schema_version is "),
        ({"measured": []}, "line 1: schema_version is "),
    ):
        results.write_text(json.dumps(lines[0] | fields), encoding="utf-8")
        with pytest.raises(OptionError, match=f"results.jsonl, {message}"):
            calibrated(tiny_checkpoint, results)


def test_recorded_prompts_and_responses_are_conversations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorded, messages = tmp_path / "recorded.jsonl", tmp_path / "messages.jsonl"
    words = {"system": "Be brief.", "prompt": "how many r?", "response": "three. " * 200}
    recorded.write_text(json.dumps(words | {"id": "a"}), encoding="utf-8")
    roles = zip(("system", "user", "assistant"), words.values(), strict=True)
    written = {"messages": [{"role": role, "content": content} for role, content in roles]}
    messages.write_text(json.dumps(written), encoding="utf-8")
    assert calibrated(tiny_checkpoint, recorded).texts == calibrated(tiny_checkpoint, messages).texts


def test_of_a_long_text_the_first_16384_tokens_are_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 60, encoding="utf-8")
    assert calibrated(tiny_checkpoint, path).n_ids == 16_384


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt: has 0 tokens, expected at least 512 to calibrate with"),
        ("a.txt", b"too short", r"a\.txt: has \d+ tokens, expected at least 512 .* Give more text of the kind"),
        ("a.txt", b"ab\xff", r"a\.txt: is not UTF-8 \(byte 2\)\. Give a UTF-8 text, or a \.jsonl file"),
        ("a.jsonl", b'{"text": "a"}\n{"text', r"a\.jsonl, line 2: is not JSON .*Give a UTF-8 text"),
        ("a.jsonl", b'{"txt": "a"}', r"""a\.jsonl, line 1: is '\{"txt": "a"\}', which has no text and no messages"""),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl, line 1: The prompt is \[\], expected a question"),
        ("a.txt", None, r"a\.txt: there is no such file\. Give a UTF-8 text"),
    ],
)
def test_a_text_that_cannot_calibrate_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(OptionError, match=message):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", calibrate=tmp_path / name)
    assert not (tmp_path / "out.partial").exists()


def test_a_text_that_cannot_be_read_or_is_huge_is_refused(
    tiny_checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    with pytest.raises(OptionError, match=r"has 900 bytes, expected at most 100\. Give a UTF-8 text"):
        calibrated(tiny_checkpoint, text)
    monkeypatch.undo()

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qwq_mlx.files.reading.open_to_read", refuse)
    with pytest.raises(OptionError, match=r"text\.txt: cannot be opened \(Permission denied\)"):
        module._read(text)


def test_recipes_and_sources_that_do_not_go_with_a_text_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[weights]\nfit = "calibrated"\n')
    with pytest.raises(OptionError, match=r"own\.toml: the fit 'calibrated' .* Give one as `calibrate`"):
        check_fit(load_recipe(own), None)
    check_fit(load_recipe(own), "text")
    with pytest.raises(OptionError, match=r"mode 'affine', but nvfp4 has nvfp4\. Leave `calibrate` out"):
        check_fit(load_recipe("nvfp4"), "text")


def test_activations_that_are_not_finite_are_refused(text: Path, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source", n_layers=1, n_shards=1)
    path = next(folder.glob("*.safetensors"))
    arrays = mx.load(str(path))
    arrays["model.norm.weight"] = mx.full((128,), 3e38, mx.bfloat16)
    mx.save_safetensors(str(path), arrays, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"activations that are NaN or infinite before lm_head\. The checkpoint"):
        convert_checkpoint(folder, tmp_path / "out", calibrate=text, quality=False)
    assert not (tmp_path / "out").exists()


def test_the_command_calibrates(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--calibrate", str(text)]
    assert main([*arguments, "--dry-run"]) == 0
    assert "groups of 64, calibrated by" in capsys.readouterr().out
    text.write_text("short", encoding="utf-8")
    assert main(arguments) == 2
    assert "expected at least 512 to calibrate" in capsys.readouterr().err


@pytest.mark.parametrize("is_cpu", [True, False])
def test_products_of_inputs_are_added_up_alike_by_numpy_and_by_mlx(
    is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwq_mlx.quant.error_feedback.MAX_CHANNELS", 128)
    if not is_cpu:  # what a GPU would do
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    random, products = np.random.default_rng(2), InputProducts("some.path")
    texts = [random.standard_normal((n, 256)).astype(np.float32) for n in (40, 7, 300)]
    floats = [each + 0.1 * random.standard_normal(each.shape).astype(np.float32) for each in texts]
    residuals = [random.standard_normal((len(each), 32)).astype(np.float32) for each in texts]
    for each in zip(texts, floats, residuals, strict=True):
        products.add(*map(mx.array, each))
    whole, drift, residual = (np.concatenate(each).astype(float) for each in (texts, floats, residuals))
    drift -= whole
    moments, drifts = list(products.moments()), products.drifts()
    assert len(moments) == len(drifts) == 2
    for place, part in enumerate((whole[:, :128], whole[:, 128:])):
        assert moments[place].dtype == np.float64
        np.testing.assert_allclose(moments[place], part.T @ part / len(whole), rtol=1e-3, atol=1e-5)
        own = drift[:, 128 * place : 128 * (place + 1)]
        np.testing.assert_allclose(np.array(drifts[place]), own.T @ part / len(whole), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.array(products.residual()), residual.T @ whole / len(whole), rtol=1e-3, atol=1e-5)
    assert list(products.moments()) == products.drifts() == []  # let go as they are asked for
    assert products.residual() is None and products._spare.size == 0


def test_the_text_that_comes_with_the_package_is_free_and_calibrates(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(module.__file__).parent
    lines = [json.loads(line) for line in (folder / "qwq.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["license"] for line in lines} == {"CC0-1.0", "MIT"}
    assert len({line["id"] for line in lines}) == len(lines)
    for source in {line["source"] for line in lines if line["license"] == "MIT"}:
        notice = (folder / f"{source.rpartition('/')[2]}.LICENSE").read_text(encoding="utf-8")
        assert notice.startswith("MIT License\n\nCopyright (c) 2024 fairydreaming\n\nPermission is hereby granted")
    # Four characters an id, of which Qwen's tokenizer makes fewer: 65,536 ids, what a GPU takes, and 16,384, a CPU.
    n_characters, n_first = 0, {"CC0-1.0": 0, "MIT": 0}
    for line in lines:
        n = sum(len(message["content"]) for message in line["messages"])
        n_first[line["license"]] += min(n, max(0, 4 * 16_384 - n_characters))
        n_characters += n
    assert n_characters >= 4 * 65_536
    assert 0.45 < n_first["CC0-1.0"] / sum(n_first.values()) < 0.65
    arguments = ["--source", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--calibrate"]) == 0
    assert "16,384 tokens of qwq.jsonl" in capsys.readouterr().out
    assert main([*arguments, "--calibrate", "--quiet", "--no-quality"]) == 0  # what follows is no text


def errors(folder: Path) -> dict[str, float]:
    """The relative error of each packed matrix."""
    tensors = read_manifest(folder).tensors
    return {name: each.relative_error for name, each in tensors.items() if each.relative_error}


def test_a_gpu_fits_all_matrices_in_the_pass(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by the functions that a GPU would run."""
    source = write_tiny_checkpoint(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "numpy", calibrate=text, quality=False)
    monkeypatch.setattr(fit_layers, "backend_name", lambda: "cuda")
    monkeypatch.setattr(fit_layers, "DEVICE_WEIGHTS", 64 * 64)  # several parts a matrix
    convert_checkpoint(source, tmp_path / "device", calibrate=text, quality=False)
    by_numpy, by_device = weights(tmp_path / "numpy"), weights(tmp_path / "device")
    assert by_numpy.keys() == by_device.keys()
    packed = [name for name in by_numpy if name.endswith("weight") and name.replace("weight", "scales") in by_numpy]
    assert "lm_head.weight" in packed
    for name in packed:
        assert by_device[name].shape == by_numpy[name].shape
        # two codes of 4 bits a byte, and behind one that differs the next have other targets, fitted to other sums
        is_first = ".0.self_attn." in name and "o_proj" not in name
        assert (by_device[name] == by_numpy[name]).mean() > (0.9 if is_first else 0.4), name
    calibration = calibrated(source, text)
    wanted, *found = (
        inputs_of(folder, calibration)["lm_head"] for folder in (source, tmp_path / "numpy", tmp_path / "device")
    )
    by_numpy_loss, by_device_loss = (float(((each - wanted) ** 2).mean()) for each in found)
    assert by_device_loss == pytest.approx(by_numpy_loss, rel=0.1)
    verify_conversion(tmp_path / "device", source=source, full=True, n_tensors=99)
    numpy_errors, device_errors = (errors(tmp_path / form) for form in ("numpy", "device"))
    assert device_errors.keys() == numpy_errors.keys() and device_errors == pytest.approx(numpy_errors, rel=0.02)
    plans: list[planning.Plan] = []
    for backend in ("cpu", "cuda"):
        monkeypatch.setattr(planning, "backend_name", lambda backend=backend: backend)
        convert_checkpoint(source, tmp_path / "none", calibrate=text, dry_run=True, on_plan=plans.append)
    more = sum(array.nbytes for name, array in by_device.items() if name.startswith("lm_head."))
    assert plans[1].calibration_bytes - plans[0].calibration_bytes == more


def test_a_gpu_leaves_an_output_matrix_whose_shard_was_dropped_to_the_packing_pass(
    server: HubServer, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(server, write_tiny_checkpoint(tmp_path / "source", n_layers=4, n_shards=4, tie=True))
    monkeypatch.setattr(fit_layers, "backend_name", lambda: "cuda")
    done = convert_checkpoint("a/b", tmp_path / "out", calibrate=text, quality=False)
    plain = convert_checkpoint("a/b", tmp_path / "plain", quality=False)
    ours, other = (weights(each.output)["model.embed_tokens.weight"] for each in (done, plain))
    assert ours.shape == other.shape and not np.array_equal(ours, other)
