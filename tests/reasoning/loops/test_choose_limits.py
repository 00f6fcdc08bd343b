"""The script that chooses limits chooses on one half, judges on the other, and leaves known loops out of the choice."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest


def trace(name: str, n_statements: int) -> dict[str, str]:
    lines = [f"Then {chr(97 + at) * 3} so the answer is 7." for at in range(n_statements)]
    return {"id": name, "prompt": "3 + 4?", "response": "\n\n".join(lines)}


@pytest.mark.parametrize(("known", "most"), [([], 9), (["--known-loop", "loop"], 4)])
def test_limits_are_chosen_on_one_half_and_judged_on_the_other(
    tmp_path: Path, repository: Path, known: list[str], most: int
) -> None:
    rows = [trace("a", 2), trace("b", 3), trace("c", 1), trace("d", 4), trace("e", 1), trace("loop", 9)]
    rows.append(trace("cut", 9) | {"finish": "length"})
    halves: list[list[dict[str, Any]]] = [[], []]
    for row in rows[:-1]:
        halves[sha256(row["id"].encode()).digest()[0] % 2].append(row)
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = str(repository / "scripts" / "choose_limits.py")
    command = [sys.executable, "-W", "error", script, str(traces), "--seeds", "0", "--rounds", "3", *known]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert found["halves"] == [len(half) for half in halves]
    assert found["limits_of_all"]["candidate"] == most + 5
    counts = {row["id"]: row["response"].count("answer") for row in rows}
    for fold, chosen, judged in zip(found["chosen_on_one_half_judged_on_the_other"], halves, halves[::-1], strict=True):
        limit = 5 + max(counts[row["id"]] for row in chosen if row["id"] != "loop" or not known)
        assert fold["limits"]["candidate"] == limit
        assert {row["id"] for row in judged if counts[row["id"]] >= limit} <= set(fold["alarms"])
        assert fold["outputs"] == len(judged)
    # whatever part "loop" is in, the others have at most 4 statements, so its 9 are at the limit that they give
    assert set(found["held_out"]) == {"2 parts", "5 parts"}
    for result in found["held_out"].values():
        assert result["alarms"] == ({} if known else {"loop": 3})
        assert result["mean_per_250"] == result["most_per_250"] == (0 if known else round(250 / 6, 2))
        assert result["rounds_with_more_than_one"] == 0


def test_a_limit_is_half_as_much_again_or_five_more(tmp_path: Path, repository: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(
        "".join(json.dumps(trace(name, n)) + "\n" for name, n in zip("abcdef", (15, 14, 3, 2, 1, 1), strict=True))
    )
    script = str(repository / "scripts" / "choose_limits.py")
    done = subprocess.run(
        [sys.executable, script, str(traces), "--seeds", "0"], capture_output=True, text=True, check=True, timeout=60
    )
    limits = json.loads(done.stdout)["limits_of_all"]
    assert (limits["candidate"], limits["doubts"]) == (23, 5)


def test_an_empty_half_is_refused(tmp_path: Path, repository: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps(trace("a", 2)) + "\n")
    script = str(repository / "scripts" / "choose_limits.py")
    done = subprocess.run(
        [sys.executable, script, str(traces)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "one half has no finished output to choose by. Give more outputs." in done.stderr
