"""The report as numbers: what each model solved, at what cost, how its confidence fits, and how the models differ.

Only whole passes over the problems are counted: with samples missing, the passes that are complete; within the first
pass, the problems that are done. Two models are compared on what both have.

Does not: write anything (`table` and `page` do).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwq_mlx.errors import OptionError
from qwq_mlx.evaluate.folder import EvaluatedModel, Evaluation
from qwq_mlx.evaluate.rows import Row
from qwq_mlx.evaluate.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_difference,
    detectable_difference,
    majority_at_k,
    mcnemar_p,
    pass_at_k,
)
from qwq_mlx.evaluate.task import Problem
from qwq_mlx.evaluate.votes import tokens_until_decided, vote_sizes, votes_of

__all__ = ["QUANTILES", "Bin", "Comparison", "Group", "ModelSummary", "Summary", "check_against", "summarise"]

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
CONFIDENCE_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
_PLACES_OF_K = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Problems of one level or subject. accuracy: share of right samples."""

    name: str
    n_problems: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers of like confidence. confidence: their mean. accuracy: share of right ones."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """One model.

    label: its name.
    weights: in words.
    size_bytes: of its tensors.
    bits_per_weight: scales included.
    settings: sampling, limits and thinking as used.
    n_problems: counted.
    n_samples: of each.
    n_rows: in its file, counted or not.
    accuracy: share of right samples.
    interval: of it, 95 %.
    endings: how many samples ended how.
    math_verify_accuracy: share of samples that it judges right, of those with a reference answer; None where it has no
      verdict at all.
    pass_at_k: by k.
    majority_at_k: by k.
    sample_tokens: by k, the mean tokens of the first k samples of a problem together.
    vote_tokens: by k, the mean tokens of a vote of the first k samples, drawn one after another and ended as soon as
      those to come cannot change the answer.
    thinking_right: quantiles of the thinking's tokens over right samples; empty without one.
    thinking_wrong: the same over wrong ones, without those that failed, which have no tokens.
    tokens_per_sample: mean.
    tokens_per_solved: tokens of all samples for each right one; None without one.
    calibration: answers by their confidence.
    calibration_error: mean distance of confidence and accuracy, weighted by the answers in each bin.
    by_level: in order of their names.
    by_subject: in order of their names.
    disputed: rows on which math-verify says otherwise.
    """

    label: str
    weights: str
    size_bytes: int
    bits_per_weight: float
    settings: Mapping[str, Any]
    n_problems: int
    n_samples: int
    n_rows: int
    accuracy: float
    interval: Interval
    endings: Mapping[str, int]
    math_verify_accuracy: float | None
    pass_at_k: Mapping[int, float]
    majority_at_k: Mapping[int, float]
    sample_tokens: Mapping[int, float]
    vote_tokens: Mapping[int, float]
    thinking_right: tuple[float, ...]
    thinking_wrong: tuple[float, ...]
    tokens_per_sample: float
    tokens_per_solved: float | None
    calibration: tuple[Bin, ...]
    calibration_error: float | None
    by_level: tuple[Group, ...]
    by_subject: tuple[Group, ...]
    disputed: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model against another, the first of the table unless one is named.

    test: "exact McNemar" for one sample of each problem, else "paired bootstrap over problems".
    difference: of the accuracies, this model's less the first's.
    interval: of it, 95 %, by the bootstrap.
    detectable: the smallest true difference that would have shown in 4 of 5 repetitions.
    only_first: ids of problems of which the first solved more samples.
    only_second: ids of problems of which this model solved more samples.
    """

    first: str
    second: str
    n_problems: int
    test: str
    difference: float
    interval: Interval
    p: float
    detectable: float
    only_first: tuple[str | int, ...]
    only_second: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole report. comparisons: of every other model with one, the first unless another was named."""

    task: str
    n_problems: int
    samples: int
    setup: Mapping[str, Any]
    models: tuple[ModelSummary, ...]
    comparisons: tuple[Comparison, ...]


def summarise(evaluation: Evaluation, rows: Mapping[str, Sequence[Row]], *, against: str | None = None) -> Summary:
    """The report of an evaluation.

    rows: of each model by its label, in the order of its file; models without any are left out.
    against: label of the model that the others are compared with, once it has rows; None is the first.
    Raises OptionError for a label that no model has.
    """
    check_against(evaluation, against)
    models = [model for model in evaluation.models if rows.get(model.label)]
    labels = [model.label for model in models]
    first = against or next(iter(labels), "")
    counted = {model.label: _by_problem(evaluation, rows[model.label]) for model in models}
    return Summary(
        task=evaluation.setup.task,
        n_problems=len(evaluation.problems),
        samples=evaluation.samples,
        setup=asdict(evaluation.setup),
        models=tuple(
            _summary(evaluation, model, counted[model.label], n_rows=len(rows[model.label])) for model in models
        ),
        comparisons=tuple(
            _comparison(evaluation, first, label, counted) for label in labels if first in counted and label != first
        ),
    )


def check_against(evaluation: Evaluation, against: str | None) -> None:
    """Raises OptionError for a label that no model of the table has."""
    labels = [model.label for model in evaluation.models]
    if against is not None and against not in labels:
        raise OptionError(f"against is {against!r}, expected one of {', '.join(labels)}.")


def _by_problem(evaluation: Evaluation, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that are counted, by problem: of whole passes, or of the first where that is not whole."""
    n = min(len(rows), len(evaluation.problems))
    n_passes = max(1, len(rows) // len(evaluation.problems))
    return [[rows[sample * len(evaluation.problems) + place] for sample in range(n_passes)] for place in range(n)]


def _summary(evaluation: Evaluation, model: EvaluatedModel, counted: list[list[Row]], *, n_rows: int) -> ModelSummary:
    problems = evaluation.problems[: len(counted)]
    by_problem = list(zip(problems, counted, strict=True))
    n_samples = len(counted[0])
    every = [row for rows in counted for row in rows]
    n_right = [sum(row.is_right for row in rows) for rows in counted]
    with_answer = [row for problem, rows in by_problem for row in rows if problem.answer]
    verified = [row.math_verify for row in with_answer if row.math_verify is not None]
    sizes = [k for k in _PLACES_OF_K if k <= n_samples]
    votes = [votes_of(problem, rows) for problem, rows in by_problem]
    groups = [vote_sizes(each, rows) for each, rows in zip(votes, counted, strict=True)]
    tokens = [[row.n_tokens for row in rows] for rows in counted]
    n_tokens = sum(row.n_tokens for row in every)
    bins = _bins(every)
    n_binned = sum(each.n for each in bins)
    return ModelSummary(
        label=model.label,
        weights=model.weights,
        size_bytes=model.size_bytes,
        bits_per_weight=model.bits_per_weight,
        settings=next((row.settings for row in every if row.seed is not None), every[0].settings),
        n_problems=len(counted),
        n_samples=n_samples,
        n_rows=n_rows,
        accuracy=sum(n_right) / len(every),
        interval=accuracy_interval(n_right, n_samples),
        endings=dict(Counter(row.ending for row in every)),
        math_verify_accuracy=sum(verified) / len(with_answer) if verified else None,
        pass_at_k={k: float(np.mean([pass_at_k(n_samples, n, k) for n in n_right])) for k in sizes},
        majority_at_k={k: float(np.mean([majority_at_k(each, n_samples, k) for each in groups])) for k in sizes},
        sample_tokens={k: float(np.mean([sum(each[:k]) for each in tokens])) for k in sizes},
        vote_tokens={
            k: float(np.mean([tokens_until_decided(each[:k], n[:k]) for each, n in zip(votes, tokens, strict=True)]))
            for k in sizes
        },
        thinking_right=_quantiles([row.n_thinking for row in every if row.is_right]),
        thinking_wrong=_quantiles([row.n_thinking for row in every if not row.is_right and row.ending != "failed"]),
        tokens_per_sample=n_tokens / len(every),
        tokens_per_solved=n_tokens / sum(n_right) if sum(n_right) else None,
        calibration=bins,
        calibration_error=sum(each.n * abs(each.confidence - each.accuracy) for each in bins) / n_binned
        if n_binned
        else None,
        by_level=_groups(problems, n_right, n_samples, lambda problem: problem.level),
        by_subject=_groups(problems, n_right, n_samples, lambda problem: problem.subject),
        disputed=tuple(row for row in every if row.is_disputed),
    )


def _quantiles(values: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(each) for each in np.quantile(values, QUANTILES)) if values else ()


def _bins(rows: Sequence[Row]) -> tuple[Bin, ...]:
    """Answered samples by confidence; a bin holds its upper edge, the first also its lower one."""
    answered = [row for row in rows if row.ending == "answered"]
    places = np.searchsorted(CONFIDENCE_EDGES[1:-1], [row.confidence for row in answered])
    binned = [[row for row, at in zip(answered, places, strict=True) if at == place] for place in range(6)]
    return tuple(
        Bin(
            n=len(each),
            confidence=float(np.mean([row.confidence for row in each])),
            accuracy=float(np.mean([row.is_right for row in each])),
        )
        for each in binned
        if each
    )


def _groups(
    problems: Sequence[Problem], n_right: Sequence[int], n_samples: int, name_of: Callable[[Problem], str]
) -> tuple[Group, ...]:
    by_name: dict[str, list[int]] = {}
    for problem, n in zip(problems, n_right, strict=True):
        by_name.setdefault(name_of(problem), []).append(n)
    return tuple(
        Group(
            name=name,
            n_problems=len(counts),
            accuracy=sum(counts) / (len(counts) * n_samples),
            interval=accuracy_interval(counts, n_samples),
        )
        for name, counts in sorted(by_name.items())
        if name
    )


def _comparison(evaluation: Evaluation, first: str, second: str, counted: Mapping[str, list[list[Row]]]) -> Comparison:
    pairs = list(zip(counted[first], counted[second], strict=False))  # as many problems as both have
    shares = [[sum(row.is_right for row in rows) / len(rows) for rows in pair] for pair in pairs]
    differences = [theirs - ours for ours, theirs in shares]
    ids = [problem.id for problem in evaluation.problems]
    only_first = tuple(name for name, each in zip(ids, differences, strict=False) if each < 0)
    only_second = tuple(name for name, each in zip(ids, differences, strict=False) if each > 0)
    interval, p = bootstrap_difference(differences)
    is_single = all(len(rows) == 1 for pair in pairs for rows in pair)
    return Comparison(
        first=first,
        second=second,
        n_problems=len(pairs),
        test="exact McNemar" if is_single else "paired bootstrap over problems",
        difference=float(np.mean(differences)),
        interval=interval,
        p=mcnemar_p(len(only_first), len(only_second)) if is_single else p,
        detectable=detectable_difference(differences),
        only_first=only_first,
        only_second=only_second,
    )
