"""The folder of an evaluation: what every model was asked, in which settings, and one file of traces a model.

    evaluation.json         task, instruction, settings, seed, samples, and the models; ends with its own sha256
    problems.jsonl          the problems, so that the folder can be judged and reported without their file
    LABEL.traces.jsonl      a line a sample, appended and synced when it ends (`generate.question_file.results`)
    LABEL.rows.jsonl        a row a sample with its verdict, made from the traces (`rows`)
    report.json, report.html

Samples lie one pass over all problems behind another: line i is sample i // n_problems of problem i % n_problems, so
asking for more samples later continues every file. Everything else must be what the folder was begun with.

Does not: run a model, or judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, SavingError, SourceError, system_said
from qwq_mlx.evaluate.models import CheckedModel
from qwq_mlx.evaluate.task import Problem, Task
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.json_object import parse_json_object, read_json_object
from qwq_mlx.generate.question_file.questions import read_lines
from qwq_mlx.options import from_json

__all__ = ["EVALUATION_NAME", "EvaluatedModel", "Evaluation", "Setup", "begin", "read_evaluation", "write_evaluation"]

_FORMAT, _SCHEMA = "qwq_mlx evaluation", 1
EVALUATION_NAME, _PROBLEMS = "evaluation.json", "problems.jsonl"
_MAX_BYTES = 16 << 20
_ADVICE = "Give the folder of an evaluation, or a new one."


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every model of a table was asked, and how: none of it may change while the table grows.

    task: name of the task.
    problems_sha256: of all problems.
    instruction: put behind each question.
    system_prompt: None leaves what the chat template writes.
    template_sha256: of a chat template in place of the models' own; None keeps those.
    settings: sampling with the seed, limits and thinking as asked for, as JSON values; None in them is the model's own.
    """

    task: str
    problems_sha256: str
    instruction: str
    system_prompt: str | None
    template_sha256: str | None
    settings: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Of the table; sample i is drawn with a seed made of it and i."""
        return int(self.settings["sampling"]["seed"])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model of the table, by its label. The fields are those of `models.CheckedModel`."""

    label: str
    folder: str
    sha256: str
    weights: str
    size_bytes: int
    bits_per_weight: float

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", self.label):  # evaluation.json may be a stranger's
            raise ValueError(f"label is {self.label!r}, expected letters, digits, _, - and ., for it names files")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """evaluation.json, without its first and last keys."""

    setup: Setup
    samples: int
    models: tuple[EvaluatedModel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation's folder as its files say it.

    folder: where it lies.
    setup: what was asked.
    samples: of each problem by each model.
    models: in the order in which they were added; the first is the one others are compared with.
    problems: of the task.
    """

    folder: Path
    setup: Setup
    samples: int
    models: tuple[EvaluatedModel, ...]
    problems: tuple[Problem, ...]

    def traces(self, label: str) -> Path:
        """The file of a model's traces."""
        return self.folder / f"{label}.traces.jsonl"

    def rows(self, label: str) -> Path:
        """The file of a model's judged rows."""
        return self.folder / f"{label}.rows.jsonl"

    def problem_of(self, index: int) -> Problem:
        """The problem that a line of traces answers."""
        return self.problems[index % len(self.problems)]

    def sample_of(self, index: int) -> int:
        """Which sample of its problem a line of traces is, from 0."""
        return index // len(self.problems)


def begin(
    folder: Path, task: Task, setup: Setup, *, samples: int, models: Sequence[CheckedModel]
) -> tuple[Evaluation, list[CheckedModel]]:
    """The evaluation of a folder with these models added, and these models by their labels in it. Writes nothing.

    A model of the folder keeps the label that it has there, though other models were named beside it then.
    Raises OptionError naming each setting that is another than in the folder, or a model whose files changed;
    SourceError for a folder that holds something else.
    """
    if not (folder / EVALUATION_NAME).exists():
        if folder.exists() and not (folder.is_dir() and all(map(_is_of_a_start, folder.iterdir()))):
            what = "a folder with other files" if folder.is_dir() else "a file"
            raise OptionError(f"output is {str(folder)!r}, {what}. {_ADVICE}")
        evaluated = tuple(map(_evaluated, models))
        new = Evaluation(folder=folder, setup=setup, samples=samples, models=evaluated, problems=task.problems)
        return new, list(models)
    existing = read_evaluation(folder)
    if differing := _differing(asdict(existing.setup), asdict(setup)):
        raise OptionError(
            f"{folder}: was begun with other values: {'; '.join(differing)}. Run it with the same, or choose another "
            "output."
        )
    if samples < existing.samples:
        raise OptionError(
            f"samples is {samples:,}, {folder} has {existing.samples:,} of each problem. Ask for at least as many, or "
            "choose another output."
        )
    known = {model.label: model for model in existing.models}
    labels = {(model.sha256, model.folder): model.label for model in existing.models}
    named = [
        replace(model, label=labels.get((model.sha256, str(model.choice.folder)), model.label)) for model in models
    ]
    for model in named:
        if model.label in known and known[model.label].sha256 != model.sha256:
            raise OptionError(
                f"{folder}: the model {model.label} was another one ({known[model.label].folder}, sha256 "
                f"{known[model.label].sha256[:12]}…, now {model.sha256[:12]}…). Choose another output."
            )
    added = [_evaluated(model) for model in named if model.label not in known]
    return replace(existing, samples=samples, models=(*existing.models, *added)), named


def _evaluated(model: CheckedModel) -> EvaluatedModel:
    return EvaluatedModel(
        label=model.label,
        folder=str(model.choice.folder),
        sha256=model.sha256,
        weights=model.weights,
        size_bytes=model.size_bytes,
        bits_per_weight=model.bits_per_weight,
    )


def _is_of_a_start(path: Path) -> bool:
    """Whether `write_evaluation` leaves this file where it is killed before it has begun an evaluation."""
    return (
        path.name == _PROBLEMS or re.fullmatch(rf"\.({_PROBLEMS}|{EVALUATION_NAME})\.\d+\.tmp", path.name) is not None
    )


def write_evaluation(evaluation: Evaluation) -> None:
    """Make the folder where it is missing, and write what it says; each file appears whole or not at all.

    Raises SavingError where the disk does not take it.
    """
    values = {
        "format": _FORMAT,
        "schema": _SCHEMA,
        "setup": asdict(evaluation.setup),
        "samples": evaluation.samples,
        "models": [asdict(model) for model in evaluation.models],
    }
    values["sha256"] = sha256_json(values)
    lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in evaluation.problems]
    try:
        evaluation.folder.mkdir(exist_ok=True)
        write_file(evaluation.folder / _PROBLEMS, "".join(lines).encode())
        write_file(
            evaluation.folder / EVALUATION_NAME, (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()
        )
    except OSError as error:
        raise SavingError(
            f"{evaluation.folder}: cannot be written {system_said(error, 'Choose an output where you may write.')}",
            error,
        ) from error


def read_evaluation(folder: Path) -> Evaluation:
    """What `write_evaluation` wrote. Raises SourceError naming the file and the fault."""
    path = folder / EVALUATION_NAME
    values = read_json_object(path, limit_bytes=_MAX_BYTES, advice=_ADVICE)
    sealed, actual = values.pop("sha256", None), sha256_json(values)
    form, schema = values.pop("format", None), values.pop("schema", None)
    if form != _FORMAT or schema != _SCHEMA:
        raise SourceError(
            f"{path}: is {form!r:.40} of schema {schema!r:.40}, expected {_FORMAT!r} of schema {_SCHEMA}. {_ADVICE}"
        )
    if sealed != actual:
        raise SourceError(f"{path}: the sha256 does not fit, so the file is damaged or edited. {_ADVICE}")
    try:
        content = from_json_value(values, _Content)
        from_json(content.setup.settings, where=str(path))
        problems = [
            from_json_value(parse_json_object(line, what=f"{_PROBLEMS}: line {place}", advice=_ADVICE), Problem)
            for place, line in read_lines(folder / _PROBLEMS)
        ]
    except FieldError as error:
        raise SourceError(f"{path}: {error}. {_ADVICE}") from error
    setup = content.setup
    task = Task(name=setup.task, problems=tuple(problems), instruction=setup.instruction)
    if not problems or task.sha256 != setup.problems_sha256:
        raise SourceError(f"{folder / _PROBLEMS}: holds other problems than {EVALUATION_NAME} says. {_ADVICE}")
    return Evaluation(
        folder=folder, setup=setup, samples=content.samples, models=content.models, problems=tuple(problems)
    )


def _differing(existing: Any, asked: Any, name: str = "") -> list[str]:
    """Each value that differs, by its name, as deep as both have objects."""
    if isinstance(existing, Mapping) and isinstance(asked, Mapping):
        prefix = f"{name}." if name and name != "settings" else ""
        return [
            each
            for key in sorted(existing.keys() | asked.keys())
            for each in _differing(existing.get(key), asked.get(key), f"{prefix}{key}")
        ]
    if json.dumps(existing) == json.dumps(asked):
        return []
    if name == "problems_sha256":
        return ["the problems (file, offset, limit or levels)"]
    return [f"{name} is {_short(asked)}, was {_short(existing)}"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
