"""Endings of outputs, written by hand: the answer that a careful reader takes from each is the one that is found.

Those that rules are tuned on are told by name where they fail; of the held-out third only the number, so that a
failure does not show what rules must not be fitted to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from endings import DATA, is_held_out, judge, read, read_endings

from qwq_mlx.reasoning.answer.math_verify import has_math_verify

ENDINGS = [row for row in read_endings() if has_math_verify() or row.get("needs") != "math-verify"]
TUNED = [row for row in ENDINGS if not is_held_out(row)]


def test_the_answer_of_every_ending_is_found() -> None:
    """One test, because 570 of their own take longer to be told of than to be read."""
    wrong = {}
    for ending in TUNED:
        found = read(ending)
        is_sure_enough = found.confidence < 0.2 if ending["answer"] is None else found.confidence >= 0.4
        is_whole = not ending.get("is_ended", True) or (found.conclusion is not None and is_sure_enough)
        if judge(ending, found.answer) != "right" or not is_whole:
            wrong[ending["id"]] = found
    assert wrong == {}


def test_held_out_endings_are_found_as_often_as_recorded() -> None:
    recorded = json.loads((DATA / "held_out.json").read_text(encoding="utf-8"))
    held_out = [row for row in read_endings() if is_held_out(row)]
    needing = [row for row in held_out if row not in ENDINGS]
    n_right = sum(judge(row, read(row).answer) == "right" for row in held_out if row not in needing)
    assert len(held_out) == recorded["endings"], "endings were added: record the score anew"
    assert n_right >= recorded["right"] - len(needing)


def test_each_ending_has_an_id_of_its_own_and_an_origin() -> None:
    rows = read_endings()
    assert [name for name, count in Counter(row["id"] for row in rows).items() if count > 1] == []
    assert all(row["origin"] and row["text"] and "prompt" in row for row in rows)


def test_the_score_shows_held_out_endings_only_where_asked(tmp_path: Path, repository: Path) -> None:
    texts = [f"It is {number}, or not" for number in range(12)]
    file = tmp_path / "few.jsonl"
    rows = [{"id": text, "origin": "test", "text": text, "prompt": None, "answer": "1"} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = {}
    for flags in ((), ("--show-held-out",)):
        command = [sys.executable, "-W", "error", str(repository / "scripts" / "score_endings.py"), str(file), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        parts = json.loads(done.stdout)
        shown[flags] = {row["text"] for part in parts.values() for row in part.get("not_right", ())}
        assert sum(part["endings"] for part in parts.values()) == len(texts)
        assert sum(part["missed"] for part in parts.values()) == len(texts)
    assert shown[()] == {row["text"] for row in rows if not is_held_out(row)}
    assert shown[("--show-held-out",)] == set(texts)


@pytest.mark.parametrize("line", ["[[0, 0, 0, 0, 0, 0, 0, 0],", "[", "{2, 3, 5,", "f(x,", "dp = [0, 0, 0,"])
@pytest.mark.parametrize("is_ended", [True, False])
def test_one_line_of_something_in_brackets_that_goes_on_is_never_sure(line: str, is_ended: bool) -> None:
    text = f"The rest is zero.\n\n**Final Answer**\n\n{line}\n"
    assert read({"id": "", "text": text, "prompt": None, "answer": None, "is_ended": is_ended}).confidence <= 0.5
