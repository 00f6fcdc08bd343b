"""The pocket's README states what the other stages found, and nothing where nothing was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from pocket import report

HISTORY = {
    "plan": {"steps": 200, "learning_rate": 1.5e-3, "quantized_from": 0.6},
    "config": {
        "vocab_size": 576,
        "num_hidden_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "losses": [[100, 1.25, 10.0], [200, 0.25, 20.0]],
    "scores": [],
}
SCORES = {
    "bf16": {
        "letters": {"solved": 499, "n": 500, "tokens": 5, "mean_tokens": 85.7},
        report.GAME: {"solved": 61, "n": 100, "tokens": 5, "mean_tokens": 700.0},
    },
    "4-bit": {report.GAME: {"solved": 57, "n": 100, "tokens": 5, "mean_tokens": 700.0}},
}


def test_the_readme_states_every_score_and_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(report, "_draw", lambda history, path: drawn.append((history, path)))
    (tmp_path / "evaluation.json").write_text(json.dumps(SCORES))
    history = tmp_path / "history.json"
    history.write_text(json.dumps(HISTORY))
    report.write_readme(history, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert drawn == [(HISTORY, tmp_path / report.PICTURE)]
    assert "| letters | 500 | 99.8% | not measured | 86 |" in text
    assert "| pocket model, bf16 | 61% |" in text and "| pocket model, 4-bit | 57% |" in text
    assert "Tree of Thoughts, b = 5, GPT-4 (published) | 74 %" in text
    assert "All 200 steps, 20 s; the loss at the end is 0.25." in text


def test_a_history_that_was_cut_off_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda history, path: None)
    (tmp_path / "evaluation.json").write_text(json.dumps(SCORES))
    cut = HISTORY | {"plan": {"steps": 17_000, "quantized_from": 0.6}}
    (tmp_path / "history.json").write_text(json.dumps(cut))
    report.write_readme(tmp_path / "history.json", tmp_path)
    assert "cut off after 200 of 17,000 steps (20 s, loss 0.25)" in (tmp_path / "README.md").read_text()


def test_the_picture_is_the_same_for_the_same_history(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        report._draw(HISTORY, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
