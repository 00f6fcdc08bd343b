"""The pocket's README states what the other stages found, and nothing where nothing was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from pocket import report

SHARES = {f"{kind} 4bit": 0.5 for kind in ("parentheses", "letters", "arithmetic")}
HISTORY = {
    "plan": {"steps": 200},
    "losses": [[100, 1.25, 10.0], [200, 0.25, 20.0]],
    "scores": [{"step": 200, **SHARES, "letters 4bit": 0.875}],
}
SCORES = {
    "bf16": {
        "letters": {"solved": 499, "n": 500, "tokens": 5, "mean_tokens": 85.7},
        report.GAME: {"solved": 61, "n": 100, "tokens": 5, "mean_tokens": 700.0},
    },
    "4-bit": {report.GAME: {"solved": 57, "n": 100, "tokens": 5, "mean_tokens": 700.0}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch = pytest.importorskip("torch")  # the recipe is read from the code that trains
    from safetensors.torch import save_file

    monkeypatch.setattr(report, "_draw", lambda history, path: path.write_text(json.dumps(history)))
    (tmp_path / "evaluation.json").write_text(json.dumps(SCORES))
    (tmp_path / "checkpoint").mkdir()
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "checkpoint" / "model.safetensors")
    return tmp_path


def _written(folder: Path, history: object, a: float = 1.0) -> str:
    import torch

    work = folder / "work"
    work.mkdir()
    torch.save({"a": a * torch.ones(3), "b": torch.zeros(2)}, work / "weights.pt")
    (work / "history.json").write_text(json.dumps(history))
    report.write_readme(work, folder)
    return (folder / "README.md").read_text()


def test_the_readme_states_every_score_and_what_was_not_measured(folder: Path) -> None:
    text = _written(folder, HISTORY)
    told = HISTORY | {"is_shipped": True}
    assert json.loads((folder / report.PICTURE).read_text()) == told and f"]({report.PICTURE})" in text
    assert json.loads((folder / report.RECORD).read_text()) == told
    assert "| letters | 500 | 99.8% | not measured | 86 |" in text
    assert "| pocket model, bf16 | 61% |" in text and "| pocket model, 4-bit | 57% |" in text
    assert "Tree of Thoughts, b = 5, GPT-4 (published) | 74 %" in text
    assert "200 of 200 steps; 20 s on one H100; the last loss is 0.25." in text
    assert (
        "right to the last id at step 200, with 4-bit weights: parentheses 50.0%, letters 87.5%, arithmetic 50.0%."
        in text
    )
    assert "second run" not in text


def test_the_record_of_other_weights_is_called_so_and_kept_for_the_next_readme(folder: Path) -> None:
    text = _written(folder, HISTORY, a=2.0)
    assert "It is a second run of this recipe with this seed, not the one whose weights ship" in text
    report.write_readme(folder / "nowhere", folder)
    assert (folder / "README.md").read_text() == text


def test_a_history_that_was_cut_off_is_called_so(folder: Path) -> None:
    text = _written(folder, HISTORY | {"plan": {"steps": 17_000}})
    assert "200 of 17,000 steps, where the run was cut off; 20 s on one H100; the last loss is 0.25." in text


def test_without_a_record_the_readme_says_so(folder: Path) -> None:
    report.write_readme(folder / "nowhere", folder)
    text = (folder / "README.md").read_text()
    assert "there is no record of a training run" in text and report.PICTURE not in text
    assert not (folder / report.PICTURE).exists()


def test_the_picture_is_the_same_for_the_same_history(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        report._draw(HISTORY, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
