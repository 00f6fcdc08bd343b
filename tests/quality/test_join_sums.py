"""The script that puts runs of measure_real.py into one table: what one run with all forms says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_as_modules import script_module

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("join_sums")


def call(
    script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr("sys.argv", [script.__name__, *arguments])
    assert script.main() == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_two_runs_joined_are_one_run_of_all_forms(
    script: ModuleType,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = script_module("measure_real")
    rows = [{"id": str(i), "prompt": f"Question {i}?", "response": f"Answer {i}, " * (3 + i)} for i in range(6)]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    results = {}
    for name, forms in (("both", ["2bit", "4bit"]), ("one", ["2bit"]), ("other", ["4bit", "2bit"])):
        common = [str(tiny_checkpoint), str(traces), *forms, "--calibration-traces", "1", "--keep", str(tmp_path)]
        results[name], _ = call(measure, [*common, "--sums", str(tmp_path / f"{name}.sums")], monkeypatch, capsys)
        (tmp_path / f"{name}.json").write_text(json.dumps(results[name]), encoding="utf-8")
    runs = [str(tmp_path / f"{name}.sums") for name in ("other", "one")]
    joined, said = call(script, [*runs, "--first", "2bit"], monkeypatch, capsys)
    assert joined["rows"] == results["both"]["rows"] and joined["rows"][1]["kl_paired"] < 0
    assert "one.sums: 2bit again: kl +0.000000" in said
    assert "bytes" in joined["rows"][0]


def test_runs_of_other_tokens_are_refused(script: ModuleType, tmp_path: Path) -> None:
    for name, n_tokens in (("a", 7), ("b", 8)):
        line = {"id": "0", "n_tokens": n_tokens, "sums": {name: [1.0, 2.0, 3.0]}}
        (tmp_path / name).write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"b: 1 traces with 8 tokens, expected the 1 with 7 of .*a\."):
        script.joined([tmp_path / "a", tmp_path / "b"])


def test_traces_of_a_text_are_left_out(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = tmp_path / "a.sums", tmp_path / "text.jsonl"
    sums = {"0": [1.0, 2.0, 3.0], "1": [5.0, 1.0, 9.0], "2": [3.0, 4.0, 5.0]}
    lines = [json.dumps({"id": id_, "n_tokens": 4, "sums": {"2bit": each}}) for id_, each in sums.items()]
    run.write_text("\n".join(lines), encoding="utf-8")
    text.write_text(json.dumps({"id": "1", "messages": []}), encoding="utf-8")
    result, _ = call(script, [str(run), "--without", str(text)], monkeypatch, capsys)
    row = result["rows"][0]
    assert (row["n_traces"], row["n_tokens"], row["kl"], row["loss"]) == (2, 8, (1 + 3) / 8, (3 + 5) / 8)
    run.write_text(lines[1], encoding="utf-8")
    with pytest.raises(SystemExit, match=r"a\.sums: no trace is left"):
        call(script, [str(run), "--without", str(text)], monkeypatch, capsys)
