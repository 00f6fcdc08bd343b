"""A check, its result, and how checks are run: one after another, and one that raises has failed.

Does not: know what is checked (the other files of this folder do).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qwq_mlx.model.load import LoadedModel, load_model
from qwq_mlx.model.memory.plan import Backend

__all__ = ["Check", "Outcome", "Result", "Subject", "run_checks"]

Outcome = Literal["ok", "failed", "not checkable", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one check says.

    outcome: "not checkable" where this backend or machine has no such thing, "not measured" where it could be measured
      but was not.
    found, expected: for people, one line each; expected is "" where nothing particular is.
    values: the same for programs, JSON types.
    name: of the check; `run_checks` fills it in.
    """

    outcome: Outcome
    found: str
    expected: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def as_json(self) -> dict[str, Any]:
        """All fields, for the report."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "found": self.found,
            "expected": self.expected,
            "values": _strict(self.values),
        }


def _strict(value: Any) -> Any:
    """The same with numbers that JSON does not have (NaN, infinity) as text."""
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Subject:
    """What is examined.

    backend: that MLX computes on. pocket_folder: the bundled model's 4-bit conversion. model_folder: of --model.
    """

    def __init__(self, backend: Backend, pocket_folder: Path, model_folder: Path | None = None) -> None:
        self.backend = backend
        self.pocket_folder = pocket_folder
        self.model_folder = model_folder

    @cached_property
    def pocket(self) -> LoadedModel:
        """The bundled model, loaded at its first use."""
        return load_model(self.pocket_folder)


@dataclass(frozen=True, slots=True)
class Check:
    """A named check; `examine` raises, or returns what it saw."""

    name: str
    examine: Callable[[Subject], Result]


def run_checks(checks: Sequence[Check], subject: Subject, progress: Callable[[str], None]) -> list[Result]:
    """Run every check, in order. progress: called with the name of the check that runs now.

    An exception is a failed check: on a machine that nobody has tried, any error is a result.
    """
    results = []
    for check in checks:
        progress(check.name)
        try:
            result = check.examine(subject)
        except Exception as error:  # noqa: BLE001 - see above; the report names it
            result = Result(outcome="failed", found=f"{type(error).__name__}: {error}", expected="no error")
        results.append(replace(result, name=check.name))
    return results
