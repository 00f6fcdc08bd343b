"""Which model runs when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_json
from gguf_files import write_gguf
from huggingface_hub import constants

from qwq_mlx import default_model
from qwq_mlx.default_model import Choice, choose_model, ready_model
from qwq_mlx.errors import ConversionError, LoadError, SourceError
from qwq_mlx.facts import POCKET, QWQ_32B_PREVIEW, ModelFacts
from qwq_mlx.files.manifest import read_manifest
from qwq_mlx.files.user_folders import user_cache_folder, user_data_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own, with a pocket checkpoint, and a current folder beside it."""
    package = tmp_path / "checkout" / "qwq_mlx"
    checkpoint = package / "pocket" / "checkpoint"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "config.json", {})
    monkeypatch.setattr(default_model, "_PACKAGE", package)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return package


def conversion(folder: Path, model: ModelFacts, *, is_quantized: bool = True) -> Path:
    folder.mkdir(parents=True)
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    extra = {"quantization": {"bits": 4}} if is_quantized else {}
    write_json(folder / "config.json", {name: getattr(model, name) for name in names} | extra)
    return folder


def test_a_named_model_wins_without_a_word(package: Path) -> None:
    assert choose_model("./some/where", {"QWQ_MLX_MODEL": "other"}) == Choice(folder=Path("some/where"))


@pytest.mark.parametrize("named", ["acme/tiny", "https://huggingface.co/acme/tiny", "hf://acme/tiny"])
def test_a_repository_in_the_cache_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    write_json(snapshot / "config.json", {})
    (tmp_path / "hub" / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--acme--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert choose_model(named).folder == snapshot
    with pytest.raises(LoadError, match=r"the Hub's cache has no such model\..*: hf download acme/big"):
        choose_model(named.replace("tiny", "big"))
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert choose_model("acme/tiny").folder == Path("acme/tiny")


def test_the_environment_comes_next_and_is_said(package: Path) -> None:
    choice = choose_model(None, {"QWQ_MLX_MODEL": "other"})
    assert choice == Choice(folder=Path("other"), note="model: other (from $QWQ_MLX_MODEL)")


def test_then_the_first_finished_conversion_of_a_32b(package: Path, tmp_path: Path) -> None:
    checkout = package.parent / "conversions"
    conversion(checkout / "a-pocket", POCKET)
    conversion(checkout / "b.partial", QWQ_32B_PREVIEW)
    conversion(checkout / "c-float", QWQ_32B_PREVIEW, is_quantized=False)
    (checkout / "d").mkdir()
    (checkout / "e.toml").write_text("")
    (checkout / "f").mkdir()
    (checkout / "f" / "config.json").write_text("[")
    second = conversion(checkout / "h", QWQ_32B_PREVIEW)
    first = conversion(checkout / "g", QWQ_32B_PREVIEW)
    assert choose_model(None, {}) == Choice(folder=first, note=f"model: {first}")
    assert second.is_dir()
    own = conversion(tmp_path / "here" / "conversions" / "z", QWQ_32B_PREVIEW)
    assert choose_model(None, {}).folder == own, "the current folder comes before the checkout"


def test_else_the_pocket_with_a_line_that_says_so(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    choice = choose_model(None, environment)
    assert choice.folder.parent == tmp_path / "cache" / "qwq-mlx"
    assert choice.source == package / "pocket" / "checkpoint"
    assert "pocket model" in choice.note and "python -m qwq_mlx.convert" in choice.note
    assert not (tmp_path / "cache").exists(), "choosing writes nothing"
    conversion(choice.folder, POCKET)
    assert choose_model(None, environment).source is None
    (package / "pocket" / "checkpoint" / "config.json").write_text('{"other": 1}')
    other = choose_model(None, environment).folder
    assert other != choice.folder, "another checkpoint, another conversion"
    monkeypatch.setattr(default_model, "_RECIPE", "4bit")
    assert choose_model(None, environment).folder.name.removeprefix("4bit") != other.name.removeprefix("pocket-4bit")


def test_the_cache_folder_follows_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    monkeypatch.setattr("sys.platform", "linux")
    assert user_cache_folder({}) == Path("/home/u/.cache/qwq-mlx")
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_cache_folder({}) == Path("/home/u/Library/Caches/qwq-mlx")


@pytest.mark.parametrize("relative", ["", ".", "cache"])
def test_no_folder_of_the_user_is_below_the_working_folder(relative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    monkeypatch.setattr("sys.platform", "linux")
    environment = {"XDG_CACHE_HOME": relative, "XDG_DATA_HOME": relative}
    assert user_cache_folder(environment) == Path("/home/u/.cache/qwq-mlx")
    assert user_data_folder(environment) == Path("/home/u/.local/share/qwq-mlx")


def test_no_model_at_all_says_what_to_do(package: Path) -> None:
    (package / "pocket" / "checkpoint" / "config.json").unlink()
    with pytest.raises(LoadError, match=r"the pocket model is not there.*Name the folder of one or set QWQ_MLX_MODEL"):
        choose_model(None, {})


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwq_mlx.convert.job.convert_checkpoint", lambda *_, **__: pytest.fail("was converted"))


def test_the_pocket_is_made_ready_once_and_a_race_is_no_error(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QWQ_MLX_MODEL", raising=False)
    choice = choose_model(None)
    made: list[tuple[Path, Path, str, bool]] = []
    told: list[str] = []

    def convert_too_late(source: Path, output: Path, *, recipe: str, quality: bool, on_plan: object) -> None:
        made.append((source, output, recipe, quality))
        conversion(output, POCKET)
        raise ConversionError("another process holds the folder")

    def convert_in_vain(source: Path, output: Path, *, recipe: str, quality: bool, on_plan: object) -> None:
        raise ConversionError("no room")

    monkeypatch.setattr("qwq_mlx.convert.job.convert_checkpoint", convert_in_vain)
    with pytest.raises(ConversionError, match="no room"):
        ready_model(None)
    monkeypatch.setattr("qwq_mlx.convert.job.convert_checkpoint", convert_too_late)
    assert ready_model(None, told.append) == choice.folder
    assert made == [(choice.source, choice.folder, "pocket-4bit", False)]
    assert told == [choice.note, f"converting the pocket model to 4 bits, once: {choice.folder}"]
    assert ready_model(None, told.append) == choice.folder
    assert len(made) == 1 and told[2:] == [choice.note]


@pytest.mark.usefixtures("no_conversion")
def test_every_command_tells_which_model_it_took(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWQ_MLX_MODEL", raising=False)
    told: list[str] = []
    assert ready_model("./some/where", told.append) == Path("some/where")
    assert told == []
    folder = conversion(package.parent / "conversions" / "a", QWQ_32B_PREVIEW)
    assert ready_model(None, told.append) == folder
    assert told == [f"model: {folder}"]


@pytest.mark.usefixtures("no_conversion")
def test_a_cache_folder_that_cannot_be_written_says_what_to_do(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QWQ_MLX_MODEL", raising=False)
    with pytest.raises(LoadError, match=r"cannot be written .*Set XDG_CACHE_HOME"):
        ready_model(None)


def test_a_gguf_is_converted_once_into_the_cache_and_again_when_it_changes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = write_gguf(tiny_checkpoint, tmp_path / "model.gguf", "Q8_0")
    told: list[str] = []
    folder = ready_model(gguf, told.append)
    assert folder.parent == tmp_path / "cache/qwq-mlx" and folder.name.startswith("model-")
    assert told[0] == f"converting {gguf}, once: {folder}"
    assert "keep their codes" in told[1]
    manifest = read_manifest(folder)
    assert manifest.gguf is not None
    assert manifest.gguf["tensors"]["lm_head.weight"] == {"type": "Q8_0", "is_repacked": True}
    assert ready_model(str(gguf), told.append) == folder
    assert len(told) == 2
    gguf.touch()
    assert choose_model(gguf).folder != folder
    (tmp_path / "link.gguf").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"link.gguf: cannot be opened \(No such file"):
        choose_model(tmp_path / "link.gguf")
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    first = choose_model(parts[0]).folder
    assert choose_model(parts[1]).folder == first
    parts[1].write_bytes(b"GGUF again")
    assert choose_model(parts[0]).folder != first
    with pytest.raises(SourceError, match=r"other.gguf: there is no such file"):
        ready_model(str(tmp_path / "other.gguf"))
