"""Figures measured side by side: contestants take turns, so what slows the machine for a while slows all of them.

A contestant is a function that does one run and returns its figure: tokens per second, or seconds. One round that does
not count warms caches up and compiles kernels.

Does not: import MLX, know models, or compare numbers from different runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qwq_mlx.errors import GenerationError

__all__ = ["Runs", "decode_tok_s", "seconds_of", "take_turns"]

Contestant = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Runs:
    """One contestant's figures, in the order of its runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest, as a fraction of the median."""
        return (max(self.values) - min(self.values)) / self.median


def take_turns(
    contestants: Mapping[str, Contestant], *, repeats: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Runs]:
    """Run every contestant `repeats` times after one warm-up, in turn; each round starts with another one.

    progress: called with the name of what runs now.
    """
    names = list(contestants)
    values: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 1):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"round {round_number} of {repeats}: {name}")
            value = contestants[name]()
            if round_number > 0:
                values[name].append(value)
    return {name: Runs(tuple(each)) for name, each in values.items()}


def decode_tok_s(tokens: Iterable[object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Tokens per second from the first token to the last, so that prefill and compilation are outside.

    Raises GenerationError for fewer than two tokens.
    """
    start = latest = 0.0
    n_tokens = 0
    for _ in tokens:
        latest = clock()
        n_tokens += 1
        if n_tokens == 1:
            start = latest
    if n_tokens < 2:
        raise GenerationError(
            f"The run gave {n_tokens} token{'s' if n_tokens != 1 else ''}, expected at least 2 to time an interval. "
            "Measure another model or more tokens."
        )
    return (n_tokens - 1) / (latest - start)


def seconds_of(work: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that the work takes; what it returns is dropped within them."""
    start = clock()
    work()
    return clock() - start
