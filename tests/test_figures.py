"""The committed figures are those that scripts/draw_figures.py draws from the committed results, byte for byte."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_as_modules import script_module

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("draw_figures")


@pytest.mark.parametrize("name", ["bench", "real", "recipes"])
def test_a_committed_figure_is_what_its_results_give(repository: Path, tmp_path: Path, name: str) -> None:
    committed = (repository / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"it was drawn by another matplotlib than {matplotlib.__version__}")
    command = [sys.executable, repository / "scripts" / "draw_figures.py", name, "--output", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8") == committed


def result(date: str, subjects: list[str], **changes: Any) -> str:
    """A line of the benchmarks, of two runs each."""
    rows = [
        {
            "subject": subject,
            "model": "a model",
            "setting": "8 rows" if subject == "rows" else "ids, context 0",
            "median": {"qwq_mlx": 15.0, "mlx-lm, same arrays": 5.0},
            "runs": {"qwq_mlx": [10.0, 20.0], "mlx-lm, same arrays": [4.0, 6.0]},
            "byte_limit": 300.0 if subject == "decode" else None,
            "fraction_of_limit": 0.05 if subject == "decode" else None,
        }
        for subject in subjects
    ]
    machine = {"device": "a chip", "cores": "2 of 2", "backend": "cpu"}
    return (
        json.dumps({"schema": 2, "date": date, "machine": machine, "load_before": 0.5, "rows": rows} | changes) + "\n"
    )


def test_benchmarks_are_drawn_from_the_newest_result_that_has_all_of_them(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BENCHMARKS", tmp_path)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    with pytest.raises(
        SystemExit, match=r"has decode, rows, samples\. Measure them: python -m qwq_mlx\.bench decode rows"
    ):
        script.draw_bench(tmp_path / "none.svg")
    all_three = ["decode", "rows", "samples"]
    (tmp_path / "2026-01-01.jsonl").write_text(result("2026-01-01T09:00", all_three), encoding="utf-8")
    (tmp_path / "2026-01-02.jsonl").write_text(
        result("2026-01-02T09:00", all_three, load_before=1.25)
        + result("2026-01-02T10:00", ["decode"])
        + result("2026-01-02T11:00", all_three, schema=1),
        encoding="utf-8",
    )
    script.draw_bench(tmp_path / "bench.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "bench.svg").read_text(encoding="utf-8"))
    assert "a model on a chip, 2 of 2 cores, cpu; 2026-01-02, load before 1.2" in texts
    assert "byte limit 300 (5%)" in texts
    assert texts.count("qwq_mlx") == texts.count("mlx-lm, same arrays") == 3
