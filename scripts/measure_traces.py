"""Measure qwq_mlx.reasoning on recorded outputs: answers found, false alarms, loops found, cost per token.

    python scripts/measure_traces.py TRACES.jsonl [--tokenizer tokenizer.json] [--seeds 300]

The file is as `recorded` says. Loops are spliced from the outputs themselves, with seeds from 5,000 on; no limit of the
detector was chosen by spliced loops. Prints indented JSON, with --json on one line.

Does not: run a model, or know whether an output's own reasoning is right.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "reasoning" / "loops"))

from recorded import is_finished, read_rows
from splices import PIECE, doubting, renamed, restating, splice

from qwq_mlx.reasoning.answer import Split, Splitter, compare
from qwq_mlx.reasoning.loops import LoopDetector
from qwq_mlx.reasoning.profile import find_profile
from qwq_mlx.reasoning.scripts import ScriptWatcher

Cutter = Callable[[str], tuple[list[int], list[str]]]
_BINS = (0.95, 0.85, 0.5, 0.0)
_REPETITIONS = (4, 6, 8, 10, 15)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it, word-like pieces stand for tokens")
    parser.add_argument("--profile", default="qwq-preview", help="reasoning profile (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=300, help="spliced loops (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line instead of many")
    options = parser.parse_args()
    rows = read_rows(options.traces)
    cut = _cutter(options.tokenizer)
    result = {
        "traces": len(rows),
        "answers": measure_answers(rows, cut, options.profile),
        "alarms": measure_alarms(rows, cut),
        "loops": measure_loops(rows, cut, options.seeds),
        "scripts": measure_scripts(rows, cut),
        "cost_us_per_token": measure_cost(rows, cut, options.profile),
    }
    print(json.dumps(result, ensure_ascii=False, indent=None if options.json else 2))


def _cutter(tokenizer: Path | None) -> Cutter:
    if tokenizer is None:
        seen: dict[str, int] = {}

        def by_words(text: str) -> tuple[list[int], list[str]]:
            pieces = PIECE.findall(text)
            return [seen.setdefault(piece, len(seen)) for piece in pieces], pieces

        return by_words
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer))

    def by_tokens(text: str) -> tuple[list[int], list[str]]:
        found = model.encode(text, add_special_tokens=False)
        # A character in several tokens is released by the last of them.
        ends = [end for _, end in found.offsets]
        places = [0, *ends[:-1]]
        shown = [text[a:b] if b > a else "" for a, b in zip(places, ends, strict=True)]
        return found.ids, shown

    return by_tokens


def measure_answers(rows: Sequence[dict[str, Any]], cut: Cutter, profile: str) -> dict[str, Any]:
    """How many expected answers are found, by what, and how often each level of confidence is right."""
    kinds: Counter[str] = Counter()
    right: Counter[float] = Counter()
    total: Counter[float] = Counter()
    wrong, without, late = [], [], []
    n_unmarked = n_stated = 0
    for row in rows:
        splitter = Splitter(find_profile(profile), prompt=row["prompt"])
        segments = [splitter.feed(text) for text in cut(row["response"])[1]]
        found: Split = splitter.finish(is_ended=is_finished(row))
        kinds[found.kind] += 1
        if found.answer is None:
            without.append(row["id"])
        if found.kind == "heading" and found.conclusion is not None:
            late.append(sum(segment == "thinking" for segment in segments[found.conclusion[0] :]))
        if isinstance(row.get("expected"), str) and found.kind in ("heading", "tag", "box"):
            n_unmarked += 1
            n_stated += _stated_alone(row, profile) == found.answer
        if isinstance(row.get("expected"), str):
            level = next(level for level in _BINS if found.confidence >= level)
            total[level] += 1
            if found.answer is not None and compare(found.answer, row["expected"]):
                right[level] += 1
            else:
                wrong.append(f"{row['id']}: {found.answer} ({found.kind}), expected {row['expected']}")
    return {
        "kinds": dict(kinds),
        "expected": sum(total.values()),
        "right": sum(right.values()),
        "right_by_confidence": {f">= {level}": f"{right[level]} of {total[level]}" for level in _BINS if total[level]},
        "same_from_sentences_alone": f"{n_stated} of {n_unmarked}",
        "not_as_expected": wrong,
        "without_answer": without,
        "max_tokens_of_a_heading_shown_as_thinking": max(late, default=0),
    }


def _stated_alone(row: dict[str, Any], profile: str) -> str | None:
    """The answer found when heading, box and tags are taken off, and the prompt asks for no tag."""
    text = row["response"].split("**Final Answer")[0]
    text = re.sub(r"<(answer)>\s*([^<\n]*)</\1>", r"\2", text, flags=re.IGNORECASE).rstrip()
    splitter = Splitter(find_profile(profile), prompt=re.sub(r"</?answer>", "", row["prompt"], flags=re.IGNORECASE))
    splitter.feed(text)
    return splitter.finish().answer


def _first_loop(ids: Sequence[int], texts: Sequence[str]) -> tuple[int, str] | None:
    detector = LoopDetector()
    for at, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
        loop = detector.feed(token_id, text)
        if loop is not None:
            return at, loop.kind
    return None


def measure_alarms(rows: Sequence[dict[str, Any]], cut: Cutter) -> dict[str, Any]:
    """Alarms on the recorded outputs, finished and cut ones apart."""
    found = {row["id"]: hit for row in rows if (hit := _first_loop(*cut(row["response"]))) is not None}
    finished = [row for row in rows if is_finished(row)]
    return {
        "finished": len(finished),
        "alarms_on_finished": {row["id"]: found[row["id"]] for row in finished if row["id"] in found},
        "alarms_on_cut": {row["id"]: found[row["id"]] for row in rows if not is_finished(row) and row["id"] in found},
    }


def measure_loops(rows: Sequence[dict[str, Any]], cut: Cutter, n_seeds: int) -> dict[str, Any]:
    """Recall on spliced near-variants by repetitions, and on exact cycles by the deadline of three and 64 tokens."""
    texts = [row["response"] for row in rows if is_finished(row) and len(row["response"]) > 1500]
    texts = [text for text in texts if "```" not in text and _first_loop(*cut(text)) is None]
    recall: dict[str, dict[str, float]] = {}
    if not texts or not n_seeds:
        return {"variants_recall": recall, "exact_in_time": "0 of 0"}
    for name, words in (("25 to 150 words", (25, 150)), ("150 to 400 words", (150, 400))):
        splices = [splice(texts, seed=seed, words=words) for seed in range(5000, 5000 + n_seeds)]
        recall[name] = {}
        for n_repetitions in _REPETITIONS:
            hits = [_first_loop(*cut(each.text(n_repetitions))) for each in splices]
            recall[name][f"{n_repetitions} repetitions"] = round(sum(hit is not None for hit in hits) / n_seeds, 3)
    kinds = {}
    for make in (renamed, doubting, restating):
        found = [_first_loop(*cut(make(texts, seed=seed, n_repetitions=20))) for seed in range(5000, 5000 + n_seeds)]
        named = Counter(hit[1] for hit in found if hit is not None)
        kinds[make.__name__] = {"recall": round(sum(named.values()) / n_seeds, 3), "reported_as": dict(named)}
    in_time = n_cycles = 0
    for seed, each in enumerate(splices[:100]):
        before = cut(each.before)[0]
        period = min(1 + (seed * seed) % 400, len(before))
        cycle = before[-period:]
        ids = before + cycle * (3 + 80 // period)
        hit = _first_loop(ids, [""] * len(ids))
        n_cycles += 1
        # The text before ends with the cycle's first repetition.
        in_time += hit is not None and hit[0] + 1 - (len(before) - period) <= 3 * period + 64
    return {"variants_recall": recall, "recall_by_kind": kinds, "exact_in_time": f"{in_time} of {n_cycles}"}


def measure_scripts(rows: Sequence[dict[str, Any]], cut: Cutter) -> dict[str, Any]:
    """Outputs with steps in other scripts than their prompt's."""
    found = {}
    for row in rows:
        watcher = ScriptWatcher(row["prompt"])
        switches = [watcher.feed(text) for text in cut(row["response"])[1]] + [watcher.finish()]
        places = [f"{dict(each.scripts)} at {each.at}" for each in switches if each is not None]
        if places:
            found[row["id"]] = places
    return found


def measure_cost(rows: Sequence[dict[str, Any]], cut: Cutter, profile: str) -> dict[str, float]:
    """CPU time of each reader, in microseconds per token, best of three over all outputs."""
    cuts = [(row["prompt"], *cut(row["response"])) for row in rows]
    n_tokens = sum(len(ids) for _, ids, _ in cuts)

    def split() -> None:
        for prompt, _, texts in cuts:
            splitter = Splitter(find_profile(profile), prompt=prompt)
            for text in texts:
                splitter.feed(text)

    def loops() -> None:
        for _, ids, texts in cuts:
            _first_loop(ids, texts)

    def scripts() -> None:
        for prompt, _, texts in cuts:
            watcher = ScriptWatcher(prompt)
            for text in texts:
                watcher.feed(text)

    costs = {}
    for reader in (split, loops, scripts):
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            reader()
            best = min(best, time.process_time() - start)
        costs[reader.__name__] = round(best / n_tokens * 1e6, 2)
    return costs


if __name__ == "__main__":
    main()
