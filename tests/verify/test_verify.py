"""A right conversion passes at every depth; one flipped bit, a lost file or another source is named."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import LoadError, OptionError, RecipeError, SourceError
from qwq_mlx.files import manifest
from qwq_mlx.files.header import read_header
from qwq_mlx.generate.reasoner import load
from qwq_mlx.quant.recipe import load_recipe, recipe_of_mapping
from qwq_mlx.verify import verify_conversion
from qwq_mlx.verify.__main__ import main
from qwq_mlx.verify.sample import verify_sample

pytestmark = pytest.mark.tiny
MIXED = (
    '[weights]\nbits = 3\n[[override]]\nmatch = "*.v_proj"\nkeep = true\n[[override]]\nmatch = "lm_head"\nbits = 8\n'
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and conversion; read only."""
    folder = tmp_path_factory.mktemp("verify")
    source = write_tiny_checkpoint(folder / "source", n_layers=1)
    (folder / "own.toml").write_text(MIXED)
    convert_checkpoint(source, folder / "model", recipe=folder / "own.toml")
    return source, folder / "model"


@pytest.fixture
def model(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted[1], tmp_path / "model"))


def test_a_right_conversion_passes_at_every_depth(converted: tuple[Path, Path]) -> None:
    source, model = converted
    quick = verify_conversion(model)
    assert (quick.is_full, quick.packed_again) == (False, ())
    read: list[int] = []
    full = verify_conversion(model, full=True, progress=read.append)
    assert full.is_full and full.n_bytes == sum(p.stat().st_size for p in model.iterdir() if p.name != "manifest.json")
    assert sum(read) > 0.8 * full.n_bytes
    again = verify_conversion(model, source=source, n_tensors=10**6)
    assert len(again.packed_again) == 15
    one = {verify_conversion(model, source=source, n_tensors=1, seed=seed).packed_again for seed in (1, 1, 2, 3)}
    assert 2 <= len(one) <= 3 and all(len(names) == 1 for names in one)


def test_any_flipped_bit_of_any_file_is_found_by_the_full_check(model: Path) -> None:
    lot = random.Random(0)
    for path in sorted(model.iterdir()):
        whole = path.read_bytes()
        for _ in range(6):
            raw = bytearray(whole)
            raw[lot.randrange(len(raw))] ^= 1 << lot.randrange(8)
            path.write_bytes(raw)
            with pytest.raises(SourceError, match=path.name):
                verify_conversion(model, full=True)
        path.write_bytes(whole)
    assert verify_conversion(model, full=True).is_full


def test_a_truncated_shard_and_a_lost_file_are_found_at_once(model: Path) -> None:
    shard = model / "model-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(SourceError, match=r"model-00001-of-00001\.safetensors \([\d,]+ bytes, expected [\d,]+\)"):
        verify_conversion(model)
    shard.unlink()
    with pytest.raises(SourceError, match=r"1 missing: model-00001-of-00001\.safetensors"):
        verify_conversion(model)


def test_every_load_makes_the_cheap_check_so_a_short_or_mixed_up_folder_never_speaks(model: Path) -> None:
    load(model)
    shard = model / "model-00001-of-00001.safetensors"
    for path, wrong in (
        (shard, shard.read_bytes()[:-1]),
        (model / "tokenizer.json", b" "),
        (model / "config.json", b""),
    ):
        before = path.read_bytes()
        path.write_bytes(wrong or before.replace(b"0", b"1", 1))
        with pytest.raises(SourceError, match=rf"(?s)is not the folder that its manifest.*{path.name}"):
            load(model)
        path.write_bytes(before)
    head = bytearray(shard.read_bytes())
    head[8 + head[8:].index(b"lm_head")] ^= 2
    shard.write_bytes(head)
    with pytest.raises(SourceError, match=rf"1 of other bytes than the manifest's: {shard.name}"):
        load(model)


def test_the_manifest_has_the_keys_that_its_module_documents(model: Path) -> None:
    found = json.loads((model / "manifest.json").read_text())
    documented = re.findall(r"^    (\w+) {2,}", str(manifest.__doc__), re.MULTILINE)
    assert sorted(found) == sorted(documented)
    assert all(name in str(manifest.__doc__) for part in ("run", "source") for name in found[part])
    assert {"size_bytes", "sha256", "header_sha256"} == set(found["files"]["config.json"])
    assert {"shard", "dtype", "shape", "sha256", "relative_error"} == set(found["tensors"]["lm_head.scales"])


def test_another_source_has_other_bits(converted: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", n_layers=1, seed=1)
    with pytest.raises(SourceError, match=r"model: 8 of 8 tensors packed again from \S+other have other bytes: .*proj"):
        verify_conversion(converted[1], source=other)


def test_one_changed_weight_of_the_source_is_found_when_its_tensor_is_drawn(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(converted[0], tmp_path / "source"))
    shard = source / "model-00002-of-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 0x80  # the sign of lm_head's last weight
    shard.write_bytes(raw)
    with pytest.raises(SourceError, match=r"1 of 15 tensors packed again from \S+ have other bytes: lm_head\.weight\."):
        verify_conversion(converted[1], source=source, n_tensors=15)


def test_a_source_of_another_shape_is_named_and_one_that_is_none_is_refused(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", n_layers=2)
    with pytest.raises(
        SourceError, match=r"model: \d+ tensors are not those that \S+other leads to: model\.layers\.1\."
    ):
        verify_conversion(converted[1], source=other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match="there is no such file"):
        verify_conversion(converted[1], source=other)


def test_no_folder_and_a_file_in_its_place_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"nowhere: there is no such folder, expected the folder of a conversion\. Give"
    ):
        verify_conversion(tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(SourceError, match=r"file: is a file, expected the folder of a conversion\. Give the one that"):
        verify_conversion(tmp_path / "file")


def test_a_folder_without_a_manifest_says_what_to_do(converted: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError, match=r"manifest\.json: there is no such file\. Convert the source again"):
        verify_conversion(converted[0])


def test_no_tensors_is_refused(converted: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match="n_tensors is 0, expected a whole number of at least 1"):
        verify_conversion(converted[1], source=converted[0], n_tensors=0)


def test_a_sample_reads_at_least_its_share_and_every_tensor_at_last(converted: tuple[Path, Path]) -> None:
    model = converted[1]
    shard = next(model.glob("*.safetensors"))
    sizes = {name: entry.end - entry.start for name, entry in read_header(shard).tensors.items()}
    seen: set[str] = set()
    for seed in range(12):
        read: list[int] = []
        drawn = verify_conversion(model, sample=25, seed=seed, progress=read.append).sampled
        n_bytes = sum(sizes[name] for name in drawn)
        assert sum(read) == n_bytes >= sum(sizes.values()) / 4
        assert n_bytes - max(sizes[name] for name in drawn) < sum(sizes.values()) / 4, "the last one drawn was needed"
        assert drawn == verify_conversion(model, sample=25, seed=seed).sampled
        seen |= set(drawn)
    assert seen == set(sizes) == set(verify_conversion(model, sample=100).sampled)


def test_a_flipped_bit_is_found_when_its_tensor_is_drawn_and_only_then(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    entry = read_header(shard).tensors["lm_head.weight"]
    with shard.open("r+b") as file:
        file.seek(entry.end - 1)
        last = file.read(1)[0]
        file.seek(entry.end - 1)
        file.write(bytes([last ^ 1]))
    n_found = 0
    for seed in range(20):
        try:
            assert entry.name not in verify_conversion(model, sample=5, seed=seed).sampled
        except SourceError as error:
            assert re.search(
                rf"model: 1 of \d+ tensors drawn have other bytes .*: {entry.name}\. Read all with `full=True` to",
                str(error),
            )
            n_found += 1
    assert 0 < n_found < 20


@pytest.mark.parametrize("share", [0, -1, 100.5, float("nan"), True, "5"])
def test_a_share_that_is_none_is_refused(converted: tuple[Path, Path], share: float) -> None:
    with pytest.raises(OptionError, match=r"sample is .*, expected a number above 0, at most 100, in percent of"):
        verify_conversion(converted[1], sample=share)


def test_a_sample_of_all_that_is_read_anyway_is_refused(converted: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match="full reads every byte, so there is nothing left to sample"):
        verify_conversion(converted[1], sample=5, full=True)


def test_a_tensor_that_the_shard_lacks_and_a_shard_that_goes_away_are_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = manifest.check_sizes(model)
    record = next(iter(found.tensors.values()))
    more = dataclasses.replace(found, tensors={**found.tensors, "model.other": record})
    with pytest.raises(SourceError, match=r"safetensors: has no tensor model\.other, which the manifest has there"):
        verify_sample(model, more, 100, 0, None)

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    headers = {each: read_header(each) for each in model.glob("*.safetensors")}
    monkeypatch.setattr("qwq_mlx.verify.sample.read_header", headers.__getitem__)
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(SourceError, match=r"safetensors: cannot be read \(Input/output error\)\. Check the disk"):
        verify_sample(model, found, 1, 0, None)


def test_a_recipe_survives_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(MIXED)
    recipe = load_recipe(tmp_path / "own.toml")
    again = recipe_of_mapping(recipe.as_mapping(), where=tmp_path / "manifest.json")
    paths = ["lm_head", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    assert [again.packing_of(p, n_layers=2) for p in paths] == [recipe.packing_of(p, n_layers=2) for p in paths]
    assert (again.name, again.fit) == ("own", recipe.fit)
    with pytest.raises(RecipeError, match=r"manifest\.json, line 1: bits is 9"):
        recipe_of_mapping({"name": "x", "weights": {"bits": 9}}, where=tmp_path / "manifest.json")


def test_the_result_goes_to_stdout_as_text_or_json(
    converted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = converted
    arguments = [str(model), "--source", str(source), "--tensors", "2", "--seed", "3", "--full"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    size = f"ok: {model}: 6 files, 0.00 GB: every byte is as the manifest says."
    assert out.startswith(f"{size}\npacked again from the source") and err == ""
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["is_full"] is True and len(result["packed_again"]) == 2 and err == ""
    assert main([str(model), "--sample", "30", "--seed", "5", "--quiet"]) == 0
    assert "drawn by lot and read, as the manifest says: " in capsys.readouterr().out


def test_the_command_names_what_is_wrong_with_the_right_code(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(model), "--seed", "1"]) == 2
    assert "--seed says which tensors are drawn, which needs --source or --sample." in capsys.readouterr().err
    assert main([str(model), "--sample", "5", "--tensors", "1"]) == 2
    assert "--tensors says how many to pack again, which needs --source." in capsys.readouterr().err
    (model / "config.json").write_text("{}")
    assert main([str(model)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {model}: is not the folder that its manifest.json describes.")

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwq_mlx.verify.check.verify_conversion", press)
    assert main([str(model)]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was changed.\n"


def test_the_terminal_shows_how_much_was_read(
    converted: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([str(converted[1]), "--full"]) == 0
    assert "\rreading: " in capfd.readouterr().err
    assert main([str(converted[1]), "--full", "--quiet"]) == 0
    assert capfd.readouterr().err == ""


def test_the_result_names_the_repository(converted: tuple[Path, Path]) -> None:
    from dataclasses import replace

    from qwq_mlx.verify.__main__ import _text

    found = replace(verify_conversion(converted[1]), repository="Qwen/QwQ-32B-Preview", commit="1" * 40)
    assert _text(found).endswith(
        f"(--full reads every byte) as the manifest says.\nsource: Qwen/QwQ-32B-Preview at {'1' * 40}"
    )


def test_help_imports_nothing_heavy_and_names_the_default(repository: Path) -> None:
    script = (
        "import sys; from qwq_mlx.verify.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('numpy', 'mlx', 'mlx_lm', 'transformers', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True)
    from qwq_mlx.verify.check import DEFAULT_TENSORS

    assert done.stdout.endswith("[]\n") and f"(default: {DEFAULT_TENSORS})" in done.stdout


def test_the_room_exports_what_it_says() -> None:
    import qwq_mlx.verify as room

    assert {name: getattr(room, name).__name__ for name in room.__all__} == {name: name for name in room.__all__}
    with pytest.raises(AttributeError, match=r"'qwq_mlx\.verify' has no attribute 'nothing'"):
        room.nothing  # noqa: B018


def test_a_file_that_nobody_vouches_for_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "modeling_qwen2.py").write_text("print('mine')")
    assert main([str(model), "--quiet"]) == 0
    assert "'modeling_qwen2.py': not in its manifest, and not read by a load." in capsys.readouterr().err
    assert verify_conversion(model).unlisted == ("modeling_qwen2.py",)
    assert main([str(model), "--full", "--quiet"]) == 1
