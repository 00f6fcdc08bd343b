"""Stall: how long rows that decode wait for a token while a newcomer's prompt is fed, one chunk between two passes.

The figure of a run is its longest wait, in ms; beside it what a pass takes without a newcomer, and mlx-lm's batch with
the same chunks. The chunk is `Limits.prefill_step` (--prefill-step of the commands): it bounds the wait.

Does not: choose a chunk.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from qwq_mlx.bench.loops import our_waits, prompt_of, their_waits
from qwq_mlx.bench.subject import OURS, THEIRS, Bench, Row, Target

__all__ = ["bench_stall"]

_N_ROWS = 4
_ALONE = "no newcomer"
_N_PASSES = 8


def bench_stall(bench: Bench) -> list[Row]:
    """Every target with every size of a chunk; one whose rows take seconds each is left out with a word."""
    targets = [target for target in bench.targets if target.share == 1]
    for target in bench.targets:
        if target.share > 1:
            bench.progress(f"{target.name}: left out, its rows take seconds each on the CPU")
    return [_row(bench, target, chunk) for target in targets for chunk in bench.options.chunks]


def _row(bench: Bench, target: Target, chunk: int) -> Row:
    newcomer, n_ids = prompt_of(bench.options.n_prompt, target.n_ids), target.n_ids
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: 1e3 * max(our_waits(target.module, newcomer, n_ids, chunk, n_rows=_N_ROWS, n_alone=1)[1]),
        _ALONE: lambda: (
            1e3 * statistics.median(our_waits(target.module, [], n_ids, chunk, n_rows=_N_ROWS, n_alone=_N_PASSES)[0])
        ),
        THEIRS: lambda: 1e3 * max(their_waits(target.theirs, newcomer, chunk, n_rows=_N_ROWS)),
    }
    setting = f"{_N_ROWS} rows, a prompt of {len(newcomer):,} ids in chunks of {chunk:,}"
    return Row(
        subject="stall",
        model=target.name,
        setting=setting,
        unit="ms",
        runs=bench.turns(contestants, f"{target.name}, {setting}"),
    )
