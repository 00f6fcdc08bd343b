"""Models of Ollama and LM Studio, found in folders laid out as these programs lay them out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.gguf.stores import find_gguf

CONTENT = b"GGUF of a model"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MODEL = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}", "size": len(CONTENT)}
TEMPLATE = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64, "size": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return tmp_path


def pull(models: Path, name: str, tag: str, layers: Any = (TEMPLATE, MODEL)) -> Path:
    """Lay a model out as `ollama pull` does. Returns its blob."""
    manifest = models / "manifests" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = models / "blobs" / f"sha256-{DIGEST}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(CONTENT)
    return blob


QWQ = "registry.ollama.ai/library/qwq"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        (f"{QWQ}/latest", "ollama:qwq"),
        (f"{QWQ}/32b-preview-q4_K_M", "ollama:qwq:32b-preview-q4_K_M"),
        ("registry.ollama.ai/someone/qwq/q8", "ollama:someone/qwq:q8"),
        ("localhost:5000/library/qwq/q4", "ollama:localhost:5000/library/qwq:q4"),
        ("hf.co/bartowski/QwQ-32B-Preview-GGUF/Q4_K_M", "ollama:hf.co/bartowski/QwQ-32B-Preview-GGUF:Q4_K_M"),
    ],
)
def test_ollamas_names_lead_to_their_blobs(home: Path, folder: str, source: str) -> None:
    blob = pull(home / ".ollama/models", *folder.rsplit("/", 1))
    found = find_gguf(source)
    assert found is not None
    assert (found.path, found.label, found.sha256) == (blob, source, DIGEST)


def test_ollama_models_names_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = pull(home / "disk", QWQ, "latest")
    with pytest.raises(SourceError, match=r"no models in .* or /usr/share/.* Set OLLAMA_MODELS"):
        find_gguf("ollama:qwq")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "disk"))
    found = find_gguf("ollama:qwq")
    assert found is not None
    assert found.path == blob


def test_a_tag_that_is_not_there_is_answered_with_those_that_are(home: Path) -> None:
    for tag in ("latest", "32b-preview-q4_K_M"):
        pull(home / ".ollama/models", QWQ, tag)
    pull(home / ".ollama/models", "hf.co/bartowski/Q-GGUF", "Q8_0")
    with pytest.raises(
        SourceError,
        match=r"^ollama:qwq:q2: has no tag 'q2'; its tags there: qwq:32b-preview-q4_K_M, qwq:latest. Give one of "
        r"these, or run: ollama pull qwq:q2$",
    ):
        find_gguf("ollama:qwq:q2")
    with pytest.raises(
        SourceError, match=r"is not there; models there: hf.co/bartowski/Q-GGUF:Q8_0, qwq:32b-preview-q4"
    ):
        find_gguf("ollama:llama3")


def test_names_that_are_listed_give_the_terminal_no_commands(home: Path) -> None:
    pull(home / ".ollama/models", QWQ, "evil\x1b[2J")
    with pytest.raises(SourceError, match=r"its tags there: 'qwq:evil\\x1b\[2J'\. Give"):
        find_gguf("ollama:qwq")


@pytest.mark.parametrize(
    "name", ["", "a/b/c/d", "a:b:c", "h:x/n/m", "../x:y", "qwq:", "q wq", "/etc", "qwq:../../x", "x" * 200]
)
def test_what_is_no_name_of_ollamas_leads_nowhere(home: Path, name: str) -> None:
    pull(home / ".ollama/models", QWQ, "q4")
    with pytest.raises((OptionError, SourceError), match=r"is no name of Ollama's|has no tag 'latest'"):
        find_gguf(f"ollama:{name}")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([TEMPLATE], "its manifest has 0 layers of a GGUF, expected 1 .* Tags that end in -mlx have none"),
        ([MODEL, MODEL], "its manifest has 2 layers"),
        ([MODEL, {"mediaType": "application/vnd.ollama.image.adapter"}], "is a model with a LoRA adapter beside it"),
        ([{**MODEL, "digest": "sha256:../../etc/passwd"}], "digest is 'sha256:../../etc/passwd', expected sha256:"),
        ([{**MODEL, "digest": 7}], "digest is '7', expected sha256:"),
        (
            [{**MODEL, "digest": f"sha256:{'1' * 64}"}],
            "blobs/sha256-1111.* is not there, which its manifest names. Pull it",
        ),
        ([{**MODEL, "size": 99}], "has 15 bytes, its manifest says 99. Pull it again: ollama pull qwq"),
        ("none", "its manifest has 0 layers"),
    ],
)
def test_odd_manifests_are_named(home: Path, layers: Any, message: str) -> None:
    pull(home / ".ollama/models", QWQ, "latest", layers)
    with pytest.raises(SourceError, match=message):
        find_gguf("ollama:qwq")


def download(models: Path, *files: str) -> None:
    for file in files:
        path = models / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)


def test_lm_studio_is_looked_for_in_its_three_folders(home: Path) -> None:
    for folder in (".cache/lm-studio/models", ".lmstudio/models", "elsewhere"):
        download(home / folder, "bartowski/Q-GGUF/Q-Q4_K_M.gguf", "bartowski/Q-GGUF/mmproj-Q-f16.gguf")
        if folder == "elsewhere":
            (home / ".lmstudio/settings.json").write_text(json.dumps({"downloadsFolder": str(home / folder)}))
        found = find_gguf("lmstudio:bartowski/Q-GGUF")
        assert found is not None
        assert found.path == home / folder / "bartowski/Q-GGUF/Q-Q4_K_M.gguf"
        assert found.sha256 is None


def test_several_files_of_lm_studio_are_listed_and_one_can_be_named(home: Path) -> None:
    models = home / ".lmstudio/models"
    download(models, "b/Q/Q-Q4_0.gguf", "b/Q/Q-Q8_0-00001-of-00002.gguf", "b/Q/Q-Q8_0-00002-of-00002.gguf", "b/Q/x.txt")
    with pytest.raises(
        SourceError,
        match=r"holds several: Q-Q4_0.gguf, Q-Q8_0-00001-of-00002.gguf. Name one of them: lmstudio:b/Q/Q-Q4_0.gguf",
    ):
        find_gguf("lmstudio:b/Q")
    found = find_gguf("lmstudio:b/Q/Q-Q8_0-00001-of-00002.gguf")
    assert found is not None
    assert found.path == models / "b/Q/Q-Q8_0-00001-of-00002.gguf"
    with pytest.raises(SourceError, match=r"has no other.gguf; it holds: Q-Q4_0.gguf"):
        find_gguf("lmstudio:b/Q/other.gguf")


def test_what_lm_studio_does_not_have_is_answered_with_what_it_has(home: Path) -> None:
    with pytest.raises(SourceError, match=r"is not in any of its folders. Give one that is, or the path of a GGUF"):
        find_gguf("lmstudio:b/Q")
    download(home / ".lmstudio/models", "b/Q/Q.gguf")
    (home / ".lmstudio/models/b/R").mkdir()
    with pytest.raises(SourceError, match=r"is not in .*\.lmstudio/models. Models there: b/Q. Give one that is"):
        find_gguf("lmstudio:b/P")
    with pytest.raises(SourceError, match=r"b/R holds no GGUF of a model"):
        find_gguf("lmstudio:b/R")
    for name in ("b", "b/Q/Q.gguf/x", "../b/Q", "b/.."):
        with pytest.raises(OptionError, match=r"is no name of LM Studio's"):
            find_gguf(f"lmstudio:{name}")


def test_a_path_is_a_gguf_by_its_name_or_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(CONTENT)
    (tmp_path / "notes.txt").write_text("GGML")
    (tmp_path / "folder.gguf").mkdir()
    found = find_gguf(tmp_path / "blob")
    assert found is not None
    assert (found.path, found.label) == (tmp_path / "blob", "blob")
    for name in ("notes.txt", "folder.gguf", "missing", "."):
        assert find_gguf(tmp_path / name) is None
    assert find_gguf("Qwen/QwQ-32B-Preview") is None
    with pytest.raises(SourceError, match=r"missing.gguf: there is no such file. Give the path of a GGUF file"):
        find_gguf(str(tmp_path / "missing.gguf"))
