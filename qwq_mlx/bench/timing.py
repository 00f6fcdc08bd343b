"""Rates measured side by side: contestants take turns, so what slows the machine for a while slows all of them.

A contestant is a function that starts a run and returns an iterator of tokens. The clock starts at the first token, so
prefill and compilation are outside, and n tokens give n - 1 intervals. One round before the clock warms caches up.

Does not: import MLX, know models, or compare numbers from different runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.facts import QWQ_32B_PREVIEW

__all__ = ["BenchOptions", "Rates", "compare", "decode_tok_s"]

Contestant = Callable[[], Iterable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How much is measured.

    n_tokens: per run. repeats: measured runs of each contestant. n_layers: of the QwQ-shaped model; 0 leaves it out.
    """

    n_tokens: int = 64
    repeats: int = 5
    n_layers: int = 2

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("n_tokens", self.n_tokens, 2, 30_000),
            ("repeats", self.repeats, 1, 10_000),
            ("n_layers", self.n_layers, 0, QWQ_32B_PREVIEW.num_hidden_layers),
        ):
            if type(value) is not int or not low <= value <= high:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {low} to {high:,}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One contestant's runs, in tokens per second."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.runs)


def compare(
    contestants: Mapping[str, Contestant],
    *,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Rates]:
    """Run every contestant `repeats` times after one warm-up, in turn; each round starts with another one.

    progress: called with the name of what runs now.
    """
    names = list(contestants)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 1):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"round {round_number} of {repeats}: {name}")
            rate = decode_tok_s(contestants[name](), clock=clock)
            if round_number > 0:
                runs[name].append(rate)
    return {name: Rates(runs=tuple(values)) for name, values in runs.items()}


def decode_tok_s(tokens: Iterable[object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Tokens per second from the first token to the last. Raises GenerationError for fewer than two tokens."""
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
