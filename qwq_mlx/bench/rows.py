"""Rows: milliseconds of a decode pass of M rows, each fed with the ids of the one before, beside mlx-lm's batch.

The figure of a run is the median of its passes. On the CPU the QwQ-shaped model is left out: a row of it takes a
second.

Does not: check that a row draws what it draws alone (tests do).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from qwq_mlx.bench.loops import our_row, prompt_of, their_sampler
from qwq_mlx.bench.subject import OURS, THEIRS, Bench, Row, Target
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["bench_rows"]

_N_PROMPT = 16
_N_WARM = 2  # passes of a run that do not count: the first fills the pipeline
_N_PASSES = 8


def bench_rows(bench: Bench) -> list[Row]:
    """Every target at every number of rows."""
    rows = []
    for target in bench.targets:
        if target.share > 1:
            bench.progress(f"{target.name}: left out, its rows take seconds each on the CPU")
            continue
        rows += [_row(bench, target, n_rows) for n_rows in bench.options.rows]
    return rows


def _row(bench: Bench, target: Target, n_rows: int) -> Row:
    prompt = prompt_of(_N_PROMPT, target.n_ids)
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: _our_pass_ms(target.module, prompt, target.n_ids, n_rows),
        THEIRS: lambda: _their_pass_ms(target.module, prompt, n_rows),
    }
    setting = f"{n_rows} row{'s' if n_rows > 1 else ''}"
    runs = bench.turns(contestants, f"{target.name}, {setting}")
    return Row(subject="rows", model=target.name, setting=setting, unit="ms", runs=runs)


def _our_pass_ms(module: Any, prompt: list[int], n_ids: int, n_rows: int) -> float:
    n_tokens = _N_WARM + _N_PASSES + 1
    started = [our_row(module, prompt, n_ids, n_tokens, seed=seed) for seed in range(n_rows)]
    decoder, rows = started[0][0], [row for _, row in started]
    seconds = []
    for _ in range(_N_WARM + _N_PASSES):
        start = time.perf_counter()
        decoder.step(rows)
        seconds.append(time.perf_counter() - start)
        for row in rows:
            if row.failure is not None:
                raise row.failure
    return 1e3 * statistics.median(seconds[_N_WARM:])


def _their_pass_ms(module: Any, prompt: list[int], n_rows: int) -> float:
    generator = import_mlx_lm("mlx_lm.generate").BatchGenerator(module, sampler=their_sampler())
    generator.insert([prompt] * n_rows, [_N_WARM + _N_PASSES + 1] * n_rows)
    seconds = []
    start = time.perf_counter()
    while generator.next_generated():
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    generator.close()
    return 1e3 * statistics.median(seconds[_N_WARM : _N_WARM + _N_PASSES])
