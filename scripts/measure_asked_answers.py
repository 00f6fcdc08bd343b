"""Measure what asking for the answer gives: outputs of the bundled model cut short, each asked behind its cut.

    python scripts/measure_asked_answers.py [--problems 60] [--cuts 0.5 0.8 0.9 1.0]

Problems (letters to count, arithmetic) are drawn at random with a fixed seed and held out of training; each is answered
greedily, and again with `max_tokens` at a share of that output (1.0 is the whole output). Prints one JSON object: for
each cut how many answers are right by reading alone and with asking, what asking cost in tokens, and of the asked
answers how many are right at each level of their probability (of which a cut text counts less as confidence).

Does not: measure a real reasoning model; the bundled one has 8.5 million parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pocket.data import held_out_problems

from qwq_mlx import Limits, Sampling, load
from qwq_mlx.pocket.problems import Problem, is_solved
from qwq_mlx.reasoning.answer import SURE

_LEVELS = (0.95, SURE, 0.5, 0.0)
_GREEDY, _LIMITS = Sampling(temperature=0.0), Limits(max_tokens=400, context=1024)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=60, help="of each kind (default: %(default)s)")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.5, 0.8, 0.9, 1.0], help="shares of each output")
    options = parser.parse_args()
    reasoner = load()
    tallies: dict[float, Counter[str]] = {cut: Counter() for cut in options.cuts}
    kinds = ("letters", "arithmetic")
    for problem in (each for kind in kinds for each in held_out_problems(kind, options.problems, seed=14)):
        whole = reasoner.generate(problem.question, sampling=_GREEDY, limits=_LIMITS)
        for cut, tally in tallies.items():
            _measure(reasoner, problem, max(1, int(cut * len(whole.ids))), tally)
    print(json.dumps({f"{cut:g} of the output": _shown(tally) for cut, tally in tallies.items()}, indent=2))


def _measure(reasoner: Any, problem: Problem, n_tokens: int, tally: Counter[str]) -> None:
    run = reasoner.stream(problem.question, sampling=_GREEDY, limits=replace(_LIMITS, max_tokens=n_tokens))
    for _ in run:
        pass
    before = run.trace()
    asked = run.ask_answer()
    after = run.trace()
    tally["outputs"] += 1
    tally["right by reading"] += is_solved(problem, before.answer)
    tally["right with asking"] += is_solved(problem, after.answer)
    tally["asked"] += asked is not None
    tally["asked tokens"] += after.asked_tokens
    if asked is not None and asked.answer is not None:
        level = next(level for level in _LEVELS if asked.confidence >= level)
        tally[f"answers asked for at {level:g} and more"] += 1
        tally[f"of these right at {level:g} and more"] += is_solved(problem, asked.answer)


def _shown(tally: Counter[str]) -> dict[str, int]:
    return dict(tally)


if __name__ == "__main__":
    main()
