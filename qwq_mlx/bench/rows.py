"""Rows: milliseconds of a decode pass of M rows, each fed with the ids of the one before, beside mlx-lm's batch.

The figure of a run is the mean of its passes: each waits for the one before, but where the program runs ahead of the
device some seem to take no time and others twice theirs. On the CPU the QwQ-shaped model is left out: a row of it takes
a second.

Does not: check that a row draws what it draws alone (tests do).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from qwq_mlx.bench.loops import our_passes, prompt_of, their_passes
from qwq_mlx.bench.subject import OURS, THEIRS, Bench, Row, Target

__all__ = ["bench_rows"]

_N_PROMPT = 16
_N_WARM = 2  # passes of a run that do not count: the first fills the pipeline
_N_PASSES = 16


def bench_rows(bench: Bench) -> list[Row]:
    """Every target at every number of rows."""
    return bench.at_rows(lambda target, n_rows: _row(bench, target, n_rows))


def _row(bench: Bench, target: Target, n_rows: int) -> Row:
    prompt, n_passes = prompt_of(_N_PROMPT, target.n_ids), _N_WARM + _N_PASSES
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: _pass_ms(our_passes(target.module, prompt, target.n_ids, n_passes, seeds=range(n_rows))[1]),
        THEIRS: lambda: _pass_ms(their_passes(target.theirs, prompt, n_passes, n_rows)),
    }
    setting = f"{n_rows} row{'s' if n_rows > 1 else ''}"
    runs = bench.turns(contestants, f"{target.name}, {setting}")
    return Row(subject="rows", model=target.name, setting=setting, unit="ms", runs=runs)


def _pass_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.fmean(seconds[_N_WARM:])
