"""The measuring script runs on any recorded outputs and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROWS = [
    {
        "id": "right",
        "prompt": "2 + 2?",
        "response": "It is 4.\n\n**Final Answer**\n\n\\[ \\boxed{4} \\]",
        "expected": "4",
    },
    {"id": "wrong", "prompt": "2 + 3?", "response": "So the answer is 6.", "expected": "5"},
    {
        "id": "cut",
        "prompt": "3 + 3?",
        "response": "Let me 想一想 think\n" + "around and around " * 40,
        "finish": "length",
    },
]


def test_the_script_counts_answers_alarms_and_scripts_of_a_small_file(tmp_path: Path, repository: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    command = [sys.executable, "-W", "error", str(repository / "scripts" / "measure_traces.py"), str(traces), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["traces"] == 3
    assert (found["answers"]["expected"], found["answers"]["right"]) == (2, 1)
    assert found["answers"]["kinds"] == {"heading": 1, "sentence": 1, "none": 1}
    assert found["answers"]["not_as_expected"] == ["wrong: 6 (sentence), expected 5"]
    assert found["alarms"] == {
        "finished": 2,
        "alarms_on_finished": {},
        "alarms_on_cut": {"cut": found["alarms"]["alarms_on_cut"]["cut"]},
    }
    assert found["alarms"]["alarms_on_cut"]["cut"][1] == "cycle"
    assert list(found["scripts"]) == ["cut"]
    assert found["loops"]["exact_in_time"] == "0 of 0"
