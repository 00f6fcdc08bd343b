"""Choose the loop detector's limits and the splitter's confidences on some outputs, and judge them on the others.

    python scripts/choose_limits.py TRACES.jsonl [--known-loop ID ...] [--seeds 100] [--rounds 50]

The file is as `recorded` says. A limit is 3/2 of the highest score that any finished output reaches, and at least 5
more: some scores are small counts. "held_out" tells how such limits do on outputs that they were not chosen by: the
outputs are shuffled and cut into 2, 5 or 10 parts, limits are chosen without each part and judged on it, in each of
--rounds rounds with a seed of its own; alarms are per 250 outputs, their mean and the most of any round, with the ids
and the rounds in which they were reported. Then fixed halves, by the parity of sha256 of each id, with the share of
loops spliced from the one that the other's limits find; and the limits from all outputs, which are the defaults.
Confidences: per kind of answer, the share that is right on each half.

A trace named by --known-loop goes round in circles by a reader's judgement: no limit is chosen by it, and "held_out"
leaves it out; on the halves its alarm counts. Does not: run a model, or change a default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "reasoning" / "loops"))

from recorded import is_finished, read_rows
from splices import PIECE, doubting, renamed, restating, splice

from qwq_mlx.reasoning.answer import Splitter, compare
from qwq_mlx.reasoning.loops import LoopDetector, LoopOptions
from qwq_mlx.reasoning.profile import find_profile

_HEADROOM = 3 / 2
_LEAST_ABOVE = 5
_FOLDS = (2, 5, 10)
_NEVER = LoopOptions(
    soon_limit=10_000, near_limit=10_000, far_limit=10_000, words_limit=10_000, n_candidates=10_000, n_doubts=10_000
)
_REPETITIONS = (4, 6, 8, 10, 15)
_N_CUTS = 6  # places at which each output is cut to see what a splitter then says


class Scores(NamedTuple):
    """The highest that each finder's score came to; as limits, what each reports at."""

    soon: float
    near: float
    far: float
    words: float
    candidate: float
    doubts: float

    def reports(self, limits: Scores) -> bool:
        """Whether any of them is at its limit."""
        return any(score >= limit for score, limit in zip(self, limits, strict=True))


def main() -> None:
    """Parse, choose, judge, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response, perhaps expected and finish")
    parser.add_argument("--known-loop", action="append", default=[], metavar="ID", help="no limit is chosen by it")
    parser.add_argument("--seeds", type=int, default=100, help="spliced loops of each kind (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=50, help="shuffles for each number of parts (default: %(default)s)"
    )
    options = parser.parse_args()
    finished = [row for row in read_rows(options.traces) if is_finished(row)]
    halves = [[row for row in finished if _half(row["id"]) == half] for half in (0, 1)]
    known = set(options.known_loop)
    if not all(any(row["id"] not in known for row in half) for half in halves):
        parser.error(f"{options.traces}: one half has no finished output to choose by. Give more outputs.")
    scores = {row["id"]: highest(row["response"]) for row in finished}
    folds = []
    for chosen, judged in (halves, halves[::-1]):
        limits = choose(scores[row["id"]] for row in chosen if row["id"] not in known)
        folds.append({"limits": limits._asdict(), **judge(judged, scores, limits, options.seeds)})
    judged = [row for row in finished if row["id"] not in known]
    everything = choose(scores[row["id"]] for row in judged)
    result = {
        "held_out": {
            f"{n_parts} parts": held_out({row["id"]: scores[row["id"]] for row in judged}, n_parts, options.rounds)
            for n_parts in _FOLDS
            if len(judged) >= n_parts
        },
        "halves": [len(half) for half in halves],
        "chosen_on_one_half_judged_on_the_other": folds,
        "limits_of_all": everything._asdict(),
        "defaults": _defaults()._asdict(),
        "confidences": [confidences(half) for half in halves],
    }
    print(json.dumps(result, ensure_ascii=False, indent=2))


def _half(trace_id: str) -> int:
    return hashlib.sha256(trace_id.encode()).digest()[0] & 1


def _defaults() -> Scores:
    options = LoopOptions()
    sums = (options.soon_limit, options.near_limit, options.far_limit, options.words_limit)
    return Scores(*sums, options.n_candidates, options.n_doubts)


def highest(text: str) -> Scores:
    """The scores that no limit stops."""
    return _highest_at(text, ())[-1]


def _highest_at(text: str, places: Sequence[int]) -> list[Scores]:
    """The highest scores up to each of the characters, and up to the end."""
    detector, ids = LoopDetector(_NEVER), dict[str, int]()
    best, found, n_chars, left = Scores(0, 0, 0, 0, 0, 0), list[Scores](), 0, list(places)
    for token in PIECE.findall(text + "\n"):
        while left and n_chars >= left[0]:
            found.append(best)
            left.pop(0)
        detector.feed(ids.setdefault(token, len(ids)), token)
        n_chars += len(token)
        soon, near, far, words = detector.sums
        best = best._replace(
            soon=max(best.soon, soon),
            near=max(best.near, near),
            far=max(best.far, far),
            words=max(best.words, words),
        )
        if "\n" in token:
            scores, most = detector.scores, _NEVER.n_doubts
            best = best._replace(
                candidate=max(best.candidate, round(scores.candidate * most)),
                doubts=max(best.doubts, round(scores.doubts * most, 1)),
            )
    return found + [best] * (1 + len(left))


def choose(scores: Any) -> Scores:
    """Limits that none of these outputs reaches, with the headroom."""
    columns = zip(*scores, strict=True)
    return Scores(*(math.ceil(max(_HEADROOM * max(column), max(column) + _LEAST_ABOVE)) for column in columns))


def held_out(scores: dict[str, Scores], n_parts: int, n_rounds: int) -> dict[str, Any]:
    """Alarms per 250 outputs where each is judged by limits that were chosen without it."""
    alarms, by_round = Counter[str](), list[int]()
    for seed in range(n_rounds):
        names = sorted(scores)
        random.Random(seed).shuffle(names)
        n_before = alarms.total()
        for part in (set(names[at::n_parts]) for at in range(n_parts)):
            limits = choose(score for name, score in scores.items() if name not in part)
            alarms.update(name for name in part if scores[name].reports(limits))
        by_round.append(alarms.total() - n_before)
    per_250 = 250 / len(scores)
    return {
        "rounds": n_rounds,
        "mean_per_250": round(per_250 * sum(by_round) / max(1, n_rounds), 2),
        "most_per_250": round(per_250 * max(by_round, default=0), 2),
        "rounds_with_more_than_one": sum(n > 1 for n in by_round),
        "alarms": dict(alarms.most_common()),
    }


def judge(rows: Sequence[dict[str, Any]], scores: dict[str, Scores], limits: Scores, n_seeds: int) -> dict[str, Any]:
    """Alarms on these outputs, and recall on loops spliced from them."""
    alarms = [row["id"] for row in rows if scores[row["id"]].reports(limits)]
    texts = [row["response"] for row in rows if len(row["response"]) > 1500 and "```" not in row["response"]]
    texts = [text for text in texts if not highest(text).reports(limits)]
    hits = dict.fromkeys(_REPETITIONS, 0)
    for seed in range(5000, 5000 + n_seeds if texts else 5000):
        each = splice(texts, seed=seed)
        places = [len(each.text(n)) for n in _REPETITIONS]
        for n, score in zip(_REPETITIONS, _highest_at(each.text(max(_REPETITIONS)), places), strict=False):
            hits[n] += score.reports(limits)
    kinds = {}
    for make, n in ((renamed, 15), (doubting, 20), (doubting, 25), (restating, 15)):
        found = [
            highest(make(texts, seed=5000 + at, n_repetitions=n)).reports(limits)
            for at in range(n_seeds if texts else 0)
        ]
        kinds[f"{make.__name__}, {n} repetitions"] = _share(sum(found), len(found))
    spliced = {f"{n} repetitions": _share(hit, n_seeds) for n, hit in hits.items()}
    return {"outputs": len(rows), "alarms": alarms, "recall_of_splices": spliced, "recall_by_kind": kinds}


def confidences(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Outputs with marks and tags taken off, cut after whole paragraphs: how often the answer found is the last one."""
    right, total, sure = dict[str, int](), dict[str, int](), dict[str, float]()
    for row in rows:
        final = _answer(row["response"], row["prompt"])
        if final.answer is None:
            continue
        text = re.sub(r"</?answer>", "", row["response"].split("**Final Answer")[0], flags=re.IGNORECASE)
        prompt = re.sub(r"</?answer>", "", row["prompt"], flags=re.IGNORECASE)
        ends = [found.start() for found in re.finditer(r"\n\s*\n", text)] or [len(text)]
        rng = random.Random(row["id"])
        for end in (*(rng.choice(ends) for _ in range(_N_CUTS)), len(text.rstrip())):
            found = _answer(text[:end], prompt)
            name = f"{found.kind}, {found.confidence:.2f}"
            if found.answer is not None:
                total[name] = total.get(name, 0) + 1
                right[name] = right.get(name, 0) + compare(found.answer, final.answer)
                sure[name] = found.confidence
    return {name: f"{right[name]} of {total[name]}" for name in sorted(total, key=lambda name: -sure[name])}


def _answer(text: str, prompt: str) -> Any:
    splitter = Splitter(find_profile("qwq-preview"), prompt=prompt)
    splitter.feed(text)
    return splitter.finish()


def _share(n: int, total: int) -> float | None:
    return round(n / total, 3) if total else None


if __name__ == "__main__":
    main()
