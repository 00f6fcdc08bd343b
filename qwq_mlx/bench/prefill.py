"""Prefill: prompt tokens per second up to and with the first token, ours beside mlx-lm's, in passes of one size.

Does not: take a prompt out of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qwq_mlx.bench.loops import our_ids, prompt_of, their_ids
from qwq_mlx.bench.subject import AS_LOADED, OURS, THEIRS, Bench, Row, Target
from qwq_mlx.bench.timing import seconds_of

__all__ = ["bench_prefill"]


def bench_prefill(bench: Bench) -> list[Row]:
    """Every target."""
    return [_row(bench, target) for target in bench.targets]


def _row(bench: Bench, target: Target) -> Row:
    n_prompt = min(max(2, bench.options.n_prompt // target.share), target.config.max_position_embeddings - 1)
    prompt = prompt_of(n_prompt, target.n_ids)

    def rate(run: Callable[[], Iterable[object]]) -> float:
        return n_prompt / seconds_of(lambda: list(run()))

    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: rate(lambda: our_ids(target.module, prompt, target.n_ids, 1)),
        THEIRS: lambda: rate(lambda: their_ids(target.theirs, prompt, 1)),
    }
    if target.twin is not None:
        contestants[AS_LOADED] = lambda: rate(lambda: their_ids(target.twin, prompt, 1))
    setting = f"{n_prompt:,} tokens"
    runs = bench.turns(contestants, f"{target.name}, prefill of {setting}")
    return Row(subject="prefill", model=target.name, setting=setting, unit="tok/s", runs=runs)
