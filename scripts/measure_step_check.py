"""Measure what a step pays at its end: the draw, the log-probability, the check for NaN and infinity, the entropy.

    python scripts/measure_step_check.py [--ids 151665] [--width 5120] [--rounds 60]

A step's last product (a dense head of `width` by `ids`, float32) and what follows it, as `generate.decode` has it,
are timed with the log-probability alone, with the check (`Inspect(entropy=False)`), and with the entropy, one round of
each after the other. The layers before the head are left out, so a whole step is longer and the shares are smaller.
Prints one JSON object: medians in microseconds, and shares of the step without check.

Does not: load a model; on Metal it was not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=151_665, help="ids the tokenizer has (default: QwQ's, %(default)s)")
    parser.add_argument("--width", type=int, default=5120, help="hidden size of the head (default: QwQ's, %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="(default: %(default)s)")
    options = parser.parse_args()
    head = mx.random.normal((options.width, options.ids), key=mx.random.key(0)) * 0.02
    mx.eval(head)
    kinds: dict[str, Callable[[Any, Any, Any], Any | None]] = {
        "without": lambda logits, total, drawn: None,
        "check": lambda logits, total, drawn: logits.sum(),
        "entropy": lambda logits, total, drawn: total - (mx.exp(logits - total) * logits).sum(),
    }
    names = list(kinds)
    heads: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for at in range(options.rounds + 3):
        hidden = mx.random.normal((1, options.width), key=mx.random.key(at + 1))
        start = time.perf_counter()
        logits = (hidden @ head)[0]
        mx.eval(logits)
        heads.append(time.perf_counter() - start)
        for name in names[at % 3 :] + names[: at % 3]:  # each comes first as often as the others
            start = time.perf_counter()
            mx.eval(*_end(logits, kinds[name], at))
            if at >= 3:
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(each) * 1e6 for name, each in times.items()}
    head_us = statistics.median(heads[3:]) * 1e6
    rounds = list(zip(*times.values(), strict=True))
    added = {
        name: statistics.median(each[place] - each[0] for each in rounds) * 1e6
        for place, name in enumerate(names)
        if place
    }
    print(
        json.dumps(
            {
                "ids": options.ids,
                "width": options.width,
                "head_us": round(head_us, 1),
                "end_us": {name: round(value, 1) for name, value in middle.items()},
                "added_us": {name: round(value, 1) for name, value in added.items()},
                "added_share": {name: round(value / (head_us + middle["without"]), 5) for name, value in added.items()},
            }
        )
    )


def _end(logits: Any, second: Callable[[Any, Any, Any], Any | None], at: int) -> list[Any]:
    """The end of a step, as `decode` builds it: an id, its log-probability, and perhaps one number more."""
    drawn = mx.random.categorical(logits, key=mx.random.key(at))
    total = mx.logsumexp(logits)
    more = second(logits, total, drawn)
    stats = [logits[drawn] - total] + ([] if more is None else [more])
    return [drawn, mx.stack(stats)]


if __name__ == "__main__":
    main()
