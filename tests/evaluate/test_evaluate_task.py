"""Tasks: the published files are read as they are, and every fault of a file is named with its line and field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import OptionError, QwqError, SourceError
from qwq_mlx.evaluate.task import BOXED, read_task


def test_the_published_files_are_read(shared: Path) -> None:
    folder = shared / "problems"
    gsm8k = read_task("gsm8k", folder / "gsm8k_test.jsonl")
    assert (len(gsm8k.problems), gsm8k.problems[0].answer, gsm8k.instruction) == (1319, "18", BOXED)
    assert all(re.fullmatch(r"-?[\d.]+", problem.answer or "") for problem in gsm8k.problems)
    math500 = read_task("math500", folder / "math500_test.jsonl", levels=["5"])
    assert len(math500.problems) == 134 and math500.problems[0].subject
    game24 = read_task("game24", folder / "game24.csv", offset=900, limit=100)
    assert [problem.id for problem in game24.problems][::99] == ["rank 901", "rank 1000"]
    assert game24.problems[0].numbers is not None and game24.problems[0].answer is None


def test_a_selection_is_part_of_the_digest_of_the_problems(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n} + 1", "answer": n + 1, "level": n % 2}) + "\n" for n in range(6))
    )
    whole, some = read_task(str(path)), read_task(str(path), levels=["1"], offset=1, limit=1)
    assert [problem.question for problem in some.problems] == ["3 + 1"]
    assert [problem.id for problem in whole.problems] == list(range(6)) and whole.sha256 != some.sha256
    assert read_task(str(path), limit=6).sha256 == whole.sha256


GOOD = {"question": "What is 1 + 1?", "answer": "2", "id": "a"}
FAULTS: list[tuple[list[Any], str]] = [
    ([], r"tasks\.jsonl: holds no problem"),
    ([GOOD, GOOD], r"problem 2 has the id 'a', as has problem 1"),
    ([{**GOOD, "id": 1}, {**GOOD, "id": "1"}], r"problem 2 has the id '1', as has problem 1"),
    ([GOOD, {"question": "x", "answer": "1"}], r"problem 2 has no id, 1 of 2 have one"),
    ([GOOD, {"question": "x", "id": "b"}], r'line 2 has neither "answer" and "numbers"'),
    ([{**GOOD, "numbers": [1, 2, 3, 4]}], r'line 1 has both "answer" and "numbers"'),
    ([{**GOOD, "answer": "  "}], r"line 1: answer is '  ', expected a text"),
    ([{**GOOD, "answer": None}], r"line 1: answer is None, expected a text"),
    ([{"answer": "2", "id": "a"}], r"line 1: question is missing, expected a text"),
    ([{**GOOD, "solutoin": "x"}], r"line 1 has the field 'solutoin', expected some of answer, id, level"),
    ([{**GOOD, "id": True}], r"line 1 has the id True, expected a text or a whole number"),
    ([{"question": "x", "numbers": [1, "2"]}], r"line 1: numbers is \[1, '2'\], expected a list of 2 to 8 whole"),
    ([[1]], r"line 1"),
]


@pytest.mark.parametrize(("lines", "message"), FAULTS)
def test_a_fault_of_a_file_is_named(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SourceError, match=message):
        read_task(str(path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"1,4 4 6\n", "row 1 has no four numbers"),
        (b"1," + b"4" * 200_000 + b"\n", r"is no CSV \(field larger than"),
        (b"1,4 4 6 8\n" * 1_700_000, "has more than 16,777,216 bytes"),
        (b"1,4 4 6 \xff\n", "byte 21 is not UTF-8"),
    ],
)
def test_a_fault_of_the_puzzles_is_named(lines: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "24.csv").write_bytes(b"Rank,Puzzles\n" + lines)
    with pytest.raises(SourceError, match=message):
        read_task("game24", tmp_path / "24.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k",), r"needs its file.*https://github.com/openai/grade-school-math.*`data`"),
        (("gsm9k",), r"task is 'gsm9k', expected one of gsm8k, math500, game24"),
        (("absent.jsonl",), r"absent.jsonl: cannot be read"),
        (("gsm8k", Path("DATA"), "offset", 9), r"offset is 9, expected less than"),
        (("gsm8k", Path("DATA"), "levels", ["5"]), r"levels names '5', expected some of the levels of gsm8k: none"),
        (("gsm8k", Path("DATA"), "limit", 0), r"limit 0 select nothing"),
        (("game24", Path("DATA")), r"has no column 'Puzzles'"),
        (("math500", Path("DATA")), r"line 1 has the field 'question', expected some of answer, level"),
    ],
)
def test_a_wrong_selection_is_named(arguments: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.write_text(json.dumps({"question": "How many?", "answer": "Two and two.\n#### 1,004"}) + "\n")
    assert read_task("gsm8k", data).problems[0].answer == "1004"
    name, *rest = [data if each == Path("DATA") else each for each in arguments]
    with pytest.raises(QwqError, match=message) as caught:
        read_task(name, *rest[:1], **dict([rest[1:]] if rest[1:] else []))
    assert isinstance(caught.value, OptionError | SourceError)
