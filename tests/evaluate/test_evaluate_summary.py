"""Reports over several models: pairs on the problems both have, votes, and passes that are not whole."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_mlx.evaluate.folder import EvaluatedModel, Evaluation, Setup
from qwq_mlx.evaluate.page import page
from qwq_mlx.evaluate.rows import Row
from qwq_mlx.evaluate.statistics import mcnemar_p
from qwq_mlx.evaluate.summary import summarise
from qwq_mlx.evaluate.table import summary_text
from qwq_mlx.evaluate.task import Problem, read_task
from qwq_mlx.options import Limits, Sampling, Thinking, to_json
from qwq_mlx.pocket import problems

SETTINGS = to_json(
    Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0, repetition_penalty=1.0, seed=1),
    Limits(max_tokens=9),
    Thinking(),
)


def evaluation(n: int, samples: int = 1, labels: str = "AB") -> Evaluation:
    models = tuple(
        EvaluatedModel(label=label, folder=label, sha256="0", weights="w", size_bytes=10**9, bits_per_weight=4.5)
        for label in labels
    )
    task = tuple(Problem(id=place, question="?", answer="1", level=str(place % 2)) for place in range(n))
    setup = Setup(
        task="t\x1b[2J",
        problems_sha256="0",
        instruction="",
        system_prompt=None,
        template_sha256=None,
        settings=SETTINGS,
    )
    return Evaluation(folder=Path("x"), setup=setup, samples=samples, models=models, problems=task)


def rows(label: str, answers: str, n: int) -> list[Row]:
    """One a character: 1 is right, - none, anything else a wrong answer; by pass over n problems."""
    return [
        Row(
            problem=place % n,
            sample=place // n,
            model=label,
            model_sha256="0",
            seed=place,
            prompt_sha256="0",
            settings=SETTINGS,
            trace=f"{label}:{place + 1}",
            ending="unanswered" if answer == "-" else "answered",
            answer=None if answer == "-" else answer,
            is_right=answer == "1",
            reason="",
            math_verify=None,
            confidence=0.9,
            n_tokens=10,
            n_thinking=5,
        )
        for place, answer in enumerate(answers)
    ]


def test_models_are_compared_on_the_problems_that_both_have() -> None:
    it = evaluation(10)
    summary = summarise(it, {"A": rows("A", "1111111000", 10), "B": rows("B", "11000001", 10)})
    [pair] = summary.comparisons
    assert (pair.first, pair.second, pair.n_problems, pair.test) == ("A", "B", 8, "exact McNemar")
    assert (pair.only_first, pair.only_second) == ((2, 3, 4, 5, 6), (7,)) and pair.p == mcnemar_p(5, 1)
    assert pair.difference == -0.5 and pair.interval.low < -0.5 < pair.interval.high
    [other] = summarise(it, {"A": rows("A", "11", 10), "B": rows("B", "10", 10)}, against="B").comparisons
    assert (other.first, other.second, other.difference) == ("B", "A", 0.5)
    waiting = summarise(it, {"A": rows("A", "11", 10), "B": []}, against="B")
    assert waiting.comparisons == () and len(waiting.models) == 1, "an interrupted run has no rows of B yet"
    assert "10 problems" in summary_text(summary) and "<svg" in page(summary)


def test_samples_vote_and_only_whole_passes_count() -> None:
    it = evaluation(2, samples=4, labels="A")
    [model] = summarise(it, {"A": rows("A", "1-" + "12" + "02" + "1", 2)}).models
    assert (model.n_problems, model.n_samples, model.n_rows, model.accuracy) == (2, 3, 7, 2 / 6)
    assert model.pass_at_k == {1: pytest.approx(1 / 3), 2: pytest.approx(0.5)}
    assert model.majority_at_k == {1: pytest.approx(1 / 3), 2: pytest.approx((1 / 3 + 2 / 3 / 2 + 0) / 2)}
    assert model.vote_tokens == {1: 10, 2: 20}, "two samples that may differ are both drawn"
    agreed = evaluation(2, samples=4, labels="A")
    [early] = summarise(agreed, {"A": rows("A", "11" + "12" + "13" + "11", 2)}).models
    assert early.sample_tokens == {1: 10, 2: 20, 4: 40}
    assert early.vote_tokens == {1: 10, 2: 20, 4: (30 + 40) / 2}, "after 1 1 1 the fourth cannot change the answer"
    [begun] = summarise(it, {"A": rows("A", "1", 2)}).models
    assert (begun.n_problems, begun.n_samples, begun.accuracy) == (1, 1, 1.0)
    both = summarise(evaluation(2, samples=2), {"A": rows("A", "1", 2), "B": rows("B", "1" * 4, 2)})
    assert re.search(r"^B +100\.0 +100\.0$", summary_text(both), re.MULTILINE), "whichever is unfinished"
    failed = [*rows("A", "1", 2), replace(rows("A", "--", 2)[1], ending="failed", n_tokens=0, n_thinking=0)]
    [half] = summarise(evaluation(2, labels="A"), {"A": failed}).models
    assert (half.accuracy, half.thinking_right[0], half.thinking_wrong) == (0.5, 5.0, ())
    assert summarise(it, {}).models == () and "no samples yet" in summary_text(summarise(it, {}))


def test_several_samples_are_compared_by_resampling_problems() -> None:
    it = evaluation(40, samples=2)
    worse = {"A": rows("A", "1" * 80, 40), "B": rows("B", "10" * 40, 40)}
    [pair] = summarise(it, worse).comparisons
    assert pair.test == "paired bootstrap over problems" and pair.p < 0.001 and pair.interval.high < 0
    [same] = summarise(it, {"A": worse["B"], "B": [replace(row, model="B") for row in worse["B"]]}).comparisons
    assert (same.p, same.difference, same.interval.low) == (1.0, 0.0, 0.0)


def test_no_text_of_a_file_reaches_the_terminal_as_a_command() -> None:
    summary = summarise(evaluation(2), {"A": rows("A", "11", 2)})
    assert summary.task == "t\x1b[2J"
    assert "\x1b" not in summary_text(summary) + page(summary)


def test_the_bundled_models_problems_become_a_task(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "scripts")
    script = importlib.import_module("write_pocket_problems")
    assert script.main(["arithmetic=5", "letters=5", "game24=5"]) == 0
    path = tmp_path / "pocket.jsonl"
    path.write_text(capsys.readouterr().out)
    task = read_task(str(path))
    assert len(task.problems) == 15
    for problem in task.problems:
        kind, _, given = str(problem.id).partition(" ")
        if problem.answer is not None:
            assert problems.is_solved(problems.Problem(kind, given, problem.question), problem.answer)
        else:
            assert problem.numbers == tuple(map(int, given.split()))
    del sys.modules["write_pocket_problems"]
