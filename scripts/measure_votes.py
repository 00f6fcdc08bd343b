"""Measure what votes give: accuracy against the number of samples, and the tokens that ending early saves.

    python scripts/measure_votes.py [--problems 50] [--kind game24] [--temperature 1.0]

Problems (Game of 24, or arithmetic) are drawn at random with a fixed seed and held out of the bundled model's training.
Each gets 16 samples once, all to their end. Votes of 1, 2, 4, 8 and 16 are counted on the first of them, with and
without ending early; the early end is replayed in the order of the samples, one after another, so it shows what a
width of 1 saves. Prints one JSON object.

Does not: measure a real reasoning model; the bundled one has 8.5 million parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pocket.data import held_out_problems

from qwq_mlx import Limits, Sampling, load
from qwq_mlx.generate.vote import count_votes, decided
from qwq_mlx.pocket.problems import Problem, is_solved

_SIZES = (1, 2, 4, 8, 16)
_LIMITS = Limits(max_tokens=500, context=1024)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--kind", choices=("game24", "arithmetic"), default="game24", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no problem later (default: %(default)s)")
    options = parser.parse_args()
    reasoner, begun_s = load(), time.perf_counter()
    tallies: dict[str, Counter[str]] = {}
    n_problems = n_right = 0
    for problem in held_out_problems(options.kind, options.problems, seed=16):
        if time.perf_counter() - begun_s > options.seconds:
            break
        sampling = Sampling(temperature=options.temperature, top_p=1.0, top_k=0, seed=n_problems)
        vote = reasoner.vote(problem.question, n=_SIZES[-1], sampling=sampling, limits=_LIMITS, stop_early=False)
        n_problems += 1
        n_right += sum(is_solved(problem, trace.answer) for trace in vote.traces)
        for n in _SIZES:
            for name, rule in _RULES.items():
                _count(tallies.setdefault(f"{n} samples, {name}", Counter()), problem, vote.traces[:n], rule)
    shown = {
        "problems": n_problems,
        "right of all samples": round(n_right / (n_problems * _SIZES[-1]), 3),
        "votes": {name: dict(tally) for name, tally in tallies.items()},
        "seconds": round(time.perf_counter() - begun_s),
    }
    print(json.dumps(shown, indent=2))


_RULES: dict[str, dict[str, Any]] = {
    "all": {"stop_early": False, "confidence": None},
    "early": {"stop_early": True, "confidence": None},
    "0.95": {"stop_early": True, "confidence": 0.95},
}


def _count(tally: Counter[str], problem: Problem, traces: Any, rule: dict[str, Any]) -> None:
    n_drawn = next(
        (n for n in range(1, len(traces)) if decided(count_votes(_answers(traces[:n])), len(traces) - n, **rule)),
        len(traces),
    )
    groups = count_votes(_answers(traces[:n_drawn]))
    tally["right"] += bool(groups) and is_solved(problem, groups[0].answer)
    tally["any right"] += any(is_solved(problem, trace.answer) for trace in traces)
    tally["samples"] += n_drawn
    tally["tokens"] += sum(len(trace.ids) + trace.asked_tokens for trace in traces[:n_drawn])


def _answers(traces: Any) -> dict[int, str]:
    return {place: trace.answer for place, trace in enumerate(traces) if trace.answer is not None}


if __name__ == "__main__":
    main()
