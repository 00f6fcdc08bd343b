"""Rows of the table: a sample of a problem by a model, with what it depends on, its trace and its verdict.

A row follows from its trace and the judges alone, so the file of rows is made anew in one rename whenever traces were
added; a verdict is kept while its trace and the judges are the same, for math-verify takes its time.

Does not: run a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SavingError, SourceError, system_said
from qwq_mlx.evaluate.folder import Evaluation
from qwq_mlx.evaluate.judge import Ending, ending_of, judge_answer, math_verify_verdicts
from qwq_mlx.evaluate.task import Problem
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.generate.question_file.questions import read_lines
from qwq_mlx.generate.question_file.results import read_traces
from qwq_mlx.model.upstream import package_version
from qwq_mlx.trace.trace import Trace

__all__ = ["Row", "judged_rows", "judges"]

_ADVICE = "Remove it; the same command makes it again from the traces."
_SCHEMA = 1  # of rows and of how they are judged; raised where either changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample of one problem by one model.

    problem: its id.
    sample: from 0.
    model: label.
    model_sha256: of what makes the model.
    seed: of the sample's draws; None where it failed before the first.
    prompt_sha256: of the prompt's ids; None where there are none.
    settings: sampling, limits and thinking as used.
    trace: file and line of the trace.
    ending: see `judge.Ending`.
    answer: what our reader found; None where there is none.
    is_right: the verdict.
    reason: of the verdict, in words.
    math_verify: its verdict; None where it has none.
    confidence: of the answer, 0 to 1, as in the trace.
    n_tokens: of the output.
    n_thinking: of them, those of the thinking.
    """

    problem: str | int
    sample: int
    model: str
    model_sha256: str
    seed: int | None
    prompt_sha256: str | None
    settings: Mapping[str, Any]
    trace: str
    ending: Ending
    answer: str | None
    is_right: bool
    reason: str
    math_verify: bool | None
    confidence: float
    n_tokens: int
    n_thinking: int

    @property
    def is_disputed(self) -> bool:
        """Whether math-verify says otherwise."""
        return self.math_verify is not None and self.math_verify != self.is_right


def judges() -> dict[str, str | int]:
    """What verdicts depend on besides traces and problems."""
    return {"schema": _SCHEMA, **{name: package_version(name) for name in ("qwq-mlx", "math-verify")}}


def judged_rows(evaluation: Evaluation, label: str, progress: Callable[[int], None] = lambda n_rows: None) -> list[Row]:
    """The rows of a model's traces so far, judged, written to its file of rows and returned.

    progress: told how many rows are there.
    Raises SourceError for a damaged file; SavingError where the disk does not take the rows.
    """
    judged = _read_rows(evaluation.rows(label))
    rows: list[Row] = []
    new: list[tuple[int, Trace | None]] = []
    for line, trace in read_traces(evaluation.traces(label)) if evaluation.traces(label).exists() else ():
        place = line["index"]
        if place >= len(evaluation.problems) * evaluation.samples:
            break
        unjudged, before = _unjudged(evaluation, label, line, trace), judged.get(place)
        if before is not None and replace(before, **_NO_VERDICT) == unjudged:
            rows.append(before)
            continue
        rows.append(_judged(unjudged, evaluation.problem_of(place), line.get("error")))
        new.append((place, trace))
        progress(len(rows))
    verdicts = math_verify_verdicts([evaluation.problem_of(place) for place, _ in new], [trace for _, trace in new])
    for (place, _), verdict in zip(new, verdicts, strict=True):
        rows[place] = replace(rows[place], math_verify=verdict)
    if new:
        _write_rows(evaluation.rows(label), rows)
    return rows


def _unjudged(evaluation: Evaluation, label: str, line: Mapping[str, Any], trace: Trace | None) -> Row:
    """What a row says besides the verdict. A trace that was replaced since has another one, in all likelihood."""
    place = line["index"]
    ending: Ending = "failed" if "error" in line or trace is None else ending_of(trace)
    answer = None if trace is None or ending != "answered" else trace.answer
    settings = line["run"]["settings"] if trace is None else trace.settings
    return Row(
        problem=evaluation.problem_of(place).id,
        sample=evaluation.sample_of(place),
        model=label,
        model_sha256=line["run"]["model_sha256"],
        seed=None if trace is None else settings["sampling"]["seed"],
        prompt_sha256=None if trace is None else sha256_json(list(trace.prompt_ids)),
        settings=settings,
        trace=f"{evaluation.traces(label).name}:{place + 1}",
        ending=ending,
        answer=answer,
        **_NO_VERDICT,
        confidence=0.0 if trace is None or answer is None else trace.confidence,
        n_tokens=0 if trace is None else len(trace.ids),
        n_thinking=0 if trace is None else trace.thinking_span[1] - trace.thinking_span[0],
    )


def _judged(row: Row, problem: Problem, failure: str | None) -> Row:
    if row.answer is not None:
        is_right, reason = judge_answer(problem, row.answer)
        return replace(row, is_right=is_right, reason=reason)
    reason = _REASONS.get(row.ending, "")
    return replace(row, reason=reason if failure is None else f"{reason}: {failure}")


_NO_VERDICT: Mapping[str, Any] = {"is_right": False, "reason": "", "math_verify": None}
_REASONS: Mapping[str, str] = {
    "cut": "the text was cut at its limit of tokens",
    "looped": "the text went round in a loop",
    "unanswered": "the text has no answer",
    "failed": "it could not be asked to its end",
}


def _write_rows(path: Path, rows: list[Row]) -> None:
    lines = [{"judges": judges()}, *(asdict(row) for row in rows)]
    try:
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    except OSError as error:
        raise SavingError(
            f"{path}: cannot be written {system_said(error, 'Make room and run it again.')}", error
        ) from (error)


def _read_rows(path: Path) -> dict[int, Row]:
    """The rows of a file by their place; none where there is no file, or its verdicts are of other judges."""
    if not path.exists():
        return {}
    lines = [
        parse_json_object(line, what=f"{path}: line {place:,}", advice=_ADVICE) for place, line in read_lines(path)
    ]
    if not lines or lines[0].get("judges") != judges():
        return {}
    try:
        return {place: from_json_value(line, Row) for place, line in enumerate(lines[1:])}
    except FieldError as error:
        raise SourceError(f"{path}: {error}. {_ADVICE}") from error
