"""A task: problems with their answers, read from a local file and checked before a model is touched.

    gsm8k    JSON lines of {"question", "answer"}, the number behind "####"
    math500  JSON lines of {"problem", "answer", "level", "subject", "unique_id", "solution"}
    game24   CSV with a column "Puzzles" of four numbers each
    FILE     JSON lines of {"question", "answer" or "numbers", "id", "level", "subject"}

"numbers" makes a line a Game of 24: any expression of exactly these numbers that makes 24 is right.

Does not: download (the files are small and their licences their own), or judge answers (`judge` does).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, SourceError, system_said
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.generate.question_file.questions import read_lines

__all__ = ["BOXED", "NAMED_TASKS", "Problem", "Task", "read_task"]

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""What the model cards of Qwen2.5-Math and QwQ-32B put behind a question."""

_GAME24 = (
    "Use each number exactly once. Please reason step by step, and put one expression that makes 24 within \\boxed{}."
)
_MAX_CSV_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    id: unique in its task.
    question: what the model is asked, before the instruction.
    answer: the reference answer; None for a Game of 24.
    numbers: of a Game of 24; None for other problems.
    level: "" where the file names none.
    subject: "" where the file names none.
    """

    id: str | int
    question: str
    answer: str | None
    numbers: tuple[int, ...] | None = None
    level: str = ""
    subject: str = ""

    @property
    def expected(self) -> str:
        """The reference answer in words."""
        return self.answer if self.answer is not None else "24 from " + " ".join(map(str, self.numbers or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Problems that are asked together.

    name: "gsm8k", "math500", "game24", or the file's name.
    problems: at least one.
    instruction: what the task itself puts behind each question.
    """

    name: str
    problems: tuple[Problem, ...]
    instruction: str

    @property
    def sha256(self) -> str:
        """Digest of all problems."""
        return sha256_json([asdict(each) for each in self.problems])


@dataclass(frozen=True, slots=True)
class _NamedTask:
    where: str
    fields: frozenset[str]
    read: Callable[[Mapping[str, Any], str], Problem]
    instruction: str = BOXED


def read_task(
    name: str,
    data: Path | None = None,
    *,
    levels: Sequence[str] = (),
    offset: int = 0,
    limit: int | None = None,
) -> Task:
    """The problems of a task.

    name: a named task, whose file is `data`, or the path of a file of problems.
    levels: only problems of these levels.
    offset: problems to pass over, of those.
    limit: problems to take at most.
    Raises OptionError for a selection that cannot be; SourceError for a file that cannot be read, line and field named.
    """
    task = _named(name, data) if name in NAMED_TASKS else _file(name, data)
    if offset < 0 or (limit is not None and limit < 1):
        raise OptionError(f"offset {offset} and limit {limit} select nothing, expected at least 0 and at least 1.")
    known_levels = {problem.level for problem in task.problems}
    if missing := [level for level in levels if level not in known_levels]:
        known = ", ".join(sorted(known_levels - {""})) or "none"
        raise OptionError(f"levels names {missing[0]!r}, expected some of the levels of {name}: {known}.")
    problems = [problem for problem in task.problems if not levels or problem.level in levels]
    problems = problems[offset : None if limit is None else offset + limit]
    if not problems:
        raise OptionError(f"offset is {offset:,}, expected less than the number of problems of {name}.")
    return Task(name=task.name, problems=tuple(problems), instruction=task.instruction)


def _named(name: str, data: Path | None) -> Task:
    named = NAMED_TASKS[name]
    if data is None:
        raise OptionError(
            f"The task {name} needs its file, which is not part of this package. Fetch {named.where} and give it as "
            "`data`."
        )
    problems = _puzzles(data) if name == "game24" else _json_lines(data, named.fields, named.read)
    return Task(name=name, problems=_unique(data, problems), instruction=named.instruction)


def _file(name: str, data: Path | None) -> Task:
    path = Path(name)
    if data is not None or path.suffix not in (".jsonl", ".json"):
        raise OptionError(
            f"task is {name!r}, expected one of {', '.join(NAMED_TASKS)} with its file as `data`, or the path of a "
            "file of problems (.jsonl) without."
        )
    fields = frozenset(("id", "question", "answer", "numbers", "level", "subject"))
    problems = _json_lines(path, fields, _own_problem)
    n_named = sum(1 for problem in problems if problem.id != "")
    if 0 < n_named < len(problems):
        place = next(place for place, problem in enumerate(problems, start=1) if problem.id == "")
        raise SourceError(
            f"{path}: problem {place:,} has no id, {n_named:,} of {len(problems):,} have one. Give all of them one, or "
            "none."
        )
    return Task(name=path.name, problems=_unique(path, problems), instruction=BOXED)


def _unique(path: Path, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Problems without an id get their place from 0. Raises SourceError where two have one id, or there is none."""
    if not problems:
        raise SourceError(f"{path}: holds no problem. Give a file with at least one.")
    numbered = [
        Problem(**{**asdict(problem), "id": place}) if problem.id == "" else problem
        for place, problem in enumerate(problems)
    ]
    places: dict[str, int] = {}
    for place, problem in enumerate(numbered, start=1):
        if str(problem.id) in places:
            raise SourceError(
                f"{path}: problem {place:,} has the id {problem.id!r}, as has problem {places[str(problem.id)]:,}. "
                "Give each problem an id of its own, or none."
            )
        places[str(problem.id)] = place
    return tuple(numbered)


def _json_lines(path: Path, fields: frozenset[str], read: Callable[[Mapping[str, Any], str], Problem]) -> list[Problem]:
    problems = []
    for place, line in read_lines(path):
        where = f"{path}: line {place:,}"
        value = parse_json_object(line, what=where, advice='Write one object a line, like {"question": ..., ...}.')
        for name in value:
            if name not in fields:
                raise SourceError(
                    f"{where} has the field {name!r}, expected some of {', '.join(sorted(fields))}. Take it out, or "
                    "give another file."
                )
        problems.append(read(value, where))
    return problems


def _text(value: Mapping[str, Any], name: str, where: str, *, is_optional: bool = False) -> str:
    """A text that is not blank. Numbers are taken as they are written, for levels and answers are often such."""
    entry = value.get(name)
    if is_optional and entry is None:
        return ""
    if isinstance(entry, (int, float)) and not isinstance(entry, bool):
        return str(entry)
    if not isinstance(entry, str) or not entry.strip():
        shown = "missing" if name not in value else repr(entry)
        raise SourceError(f"{where}: {name} is {shown}, expected a text. Add it, or take the line out.")
    return entry


def _gsm8k(value: Mapping[str, Any], where: str) -> Problem:
    _, mark, answer = _text(value, "answer", where).rpartition("####")
    if not mark or not answer.strip():
        raise SourceError(f"{where}: the answer has no number behind '####'. Give the file of GSM8K itself.")
    return Problem(id="", question=_text(value, "question", where), answer=answer.strip().replace(",", ""))


def _math500(value: Mapping[str, Any], where: str) -> Problem:
    return Problem(
        id=_text(value, "unique_id", where, is_optional=True),
        question=_text(value, "problem", where),
        answer=_text(value, "answer", where),
        level=_text(value, "level", where, is_optional=True),
        subject=_text(value, "subject", where, is_optional=True),
    )


def _own_problem(value: Mapping[str, Any], where: str) -> Problem:
    if ("answer" in value) == ("numbers" in value):
        both = "both" if "answer" in value else "neither"
        raise SourceError(
            f'{where} has {both} "answer" and "numbers". Give the reference answer, or the numbers of 24.'
        )
    identity = value.get("id", "")
    if "id" in value and (not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == ""):
        raise SourceError(f"{where} has the id {identity!r}, expected a text or a whole number.")
    numbers = value.get("numbers")
    if "numbers" in value and not _are_numbers(numbers):
        raise SourceError(f"{where}: numbers is {numbers!r}, expected a list of 2 to 8 whole numbers from 0.")
    return Problem(
        id=identity,
        question=_text(value, "question", where),
        answer=None if numbers is not None else _text(value, "answer", where),
        numbers=None if numbers is None else tuple(numbers),
        level=_text(value, "level", where, is_optional=True),
        subject=_text(value, "subject", where, is_optional=True),
    )


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= 8 and all(type(each) is int and each >= 0 for each in value)


def _puzzles(path: Path) -> list[Problem]:
    """The list that Tree of Thoughts uses (arXiv 2305.10601), by rank; it reports on ranks 901 to 1,000."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CSV_BYTES + 1)
        if len(raw) > _MAX_CSV_BYTES:
            raise SourceError(f"{path}: has more than {_MAX_CSV_BYTES:,} bytes. Give the CSV of puzzles.")
        reader = csv.DictReader(io.StringIO(raw.decode("utf-8-sig")))
        rows = list(reader)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Give the CSV of puzzles.')}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: byte {error.start:,} is not UTF-8. Give the CSV of puzzles.") from error
    except csv.Error as error:
        raise SourceError(f"{path}: is no CSV ({error}). Give the CSV of puzzles.") from error
    if "Puzzles" not in (reader.fieldnames or ()):
        raise SourceError(f"{path}: has no column 'Puzzles'. Give the CSV of puzzles.")
    problems = []
    for rank, row in enumerate(rows, start=1):
        puzzle = (row.get("Puzzles") or "").split()
        if len(puzzle) != 4 or not all(each.isascii() and each.isdecimal() for each in puzzle):
            raise SourceError(f"{path}: row {rank:,} has no four numbers under 'Puzzles'. Give the CSV of puzzles.")
        problems.append(
            Problem(
                id=f"rank {rank}",
                question=f"Use the numbers {' '.join(puzzle)} and basic arithmetic (+ - * /) to make 24.",
                answer=None,
                numbers=tuple(map(int, puzzle)),
            )
        )
    return problems


NAMED_TASKS: Mapping[str, _NamedTask] = {
    "gsm8k": _NamedTask(
        "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
        frozenset(("question", "answer")),
        _gsm8k,
    ),
    "math500": _NamedTask(
        "https://huggingface.co/datasets/HuggingFaceH4/MATH-500 (test.jsonl)",
        frozenset(("problem", "solution", "answer", "subject", "level", "unique_id")),
        _math500,
    ),
    "game24": _NamedTask(
        "https://github.com/princeton-nlp/tree-of-thought-llm (src/tot/data/24/24.csv)",
        frozenset(),
        _own_problem,
        _GAME24,
    ),
}
"""Name -> where its file is published, its fields, and how a line becomes a problem."""
