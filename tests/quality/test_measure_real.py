"""The script behind the table of real models, against whole-model logits in numpy and errors by trace."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from scripts_as_modules import script_module

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.model.load import load_model

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("measure_real")


def log_softmax(folder: Path, ids: tuple[int, ...]) -> np.ndarray:
    logits = np.array(load_model(folder, compute_type="float32").module(mx.array([ids])))[0].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_rows_are_what_numpy_finds_from_the_whole_models(
    script: ModuleType, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for recipe in ("4bit-min-max", "4bit"):
        convert_checkpoint(tiny_checkpoint, tmp_path / recipe, recipe=recipe, quality=False)
    random = np.random.default_rng(3)
    windows = [
        script.Window(ids=tuple(random.integers(0, 298, n).tolist()), first=first)
        for n, first in ((30, 4), (17, 9), (25, 1))
    ]
    forms = [script.open_model_folder(tmp_path / recipe) for recipe in ("4bit-min-max", "4bit")]
    tallies = script.measure_forms(script.open_model_folder(tiny_checkpoint), forms, windows, chunk=50)
    first, second = script.rows_of(tallies)

    tokens: list[list[np.ndarray]] = []  # of each form and trace, (tokens, KL and same and loss)
    for recipe in ("4bit-min-max", "4bit"):
        tokens.append([])
        for window in windows:
            at = np.arange(window.first - 1, len(window.ids) - 1)
            p, q = (log_softmax(folder, window.ids)[at] for folder in (tiny_checkpoint, tmp_path / recipe))
            following = np.array(window.ids)[at + 1][:, None]
            loss = np.take_along_axis(p - q, following, 1)[:, 0]
            kl, same = (np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1)
            tokens[-1].append(np.stack([kl, same.astype(float), loss], axis=1))
    assert (first["n_traces"], first["n_tokens"]) == (3, 26 + 8 + 24)
    for row, traces in ((first, tokens[0]), (second, tokens[1])):
        paired = [each - other for each, other in zip(traces, tokens[0], strict=True)]
        for suffix, values in (("", traces), ("_paired", paired)):
            whole = np.concatenate(values)
            # The error of a mean over 58 tokens of 3 traces: each trace's sum may lie apart from its share of the mean.
            apart = np.array([(each - whole.mean(0)).sum(0) for each in values])
            error = np.sqrt((apart**2).sum(0) * 3 / 2) / len(whole)
            for place, name in enumerate(script.MEASURES):
                assert row[f"{name}{suffix}"] == pytest.approx(whole.mean(0)[place], abs=2e-5)
                assert row[f"{name}{suffix}_se"] == pytest.approx(error[place], abs=2e-5)
    assert first["kl"] > 1e-3 and second["kl_paired"] != 0


def test_traces_for_calibration_are_not_measured_and_tokens_are_bounded(
    script: ModuleType,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"id": str(i), "prompt": f"Question {i}?", "response": f"Answer {i}, " * 40} for i in range(18)]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    forms = ["2bit", "size-of-2bit", "3bit+calibrate"]
    monkeypatch.setattr(
        "sys.argv",
        [
            "measure_real.py",
            str(tiny_checkpoint),
            str(traces),
            *forms,
            "--tokens",
            "150",
            "--work",
            str(tmp_path),
            "--sums",
            str(tmp_path / "sums"),
        ],
    )
    assert script.main() == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in shown["rows"]] == forms
    assert {row["n_tokens"] for row in shown["rows"]} == {150}
    assert shown["rows"][2]["kl"] < shown["rows"][0]["kl"]
    sums = [json.loads(line) for line in (tmp_path / "sums").read_text().splitlines()]
    assert "0" not in [each["id"] for each in sums] and sum(each["n_tokens"] for each in sums) == 150
    assert sum(each["sums"]["2bit"][0] for each in sums) / 150 == pytest.approx(shown["rows"][0]["kl"], abs=1e-5)
    measured = script.read_windows([rows[1]], script.open_model_folder(tiny_checkpoint), 8192)[0]
    assert 0 < measured.first < len(measured.ids)
    assert script.write_calibration(tmp_path / "c.jsonl", rows[::16]).read_text().count('"messages"') == 2


def test_a_form_that_is_none_is_refused(script: ModuleType, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"4bit\+awq: ends in \+awq, expected \+calibrate"):
        script.form_folder("4bit+awq", tiny_checkpoint, tmp_path, tmp_path / "none.txt")
