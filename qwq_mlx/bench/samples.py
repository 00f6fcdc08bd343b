"""Samples: tokens per second of n samples of one prompt, its prefill among them, beside mlx-lm's batch and single runs.

Ours feeds the prompt once; mlx-lm's BatchGenerator feeds it for every row. What single runs of
mlx-lm reach does not depend on how many there are, so one is timed.

Does not: end a sample early, as a vote does.
"""

from __future__ import annotations

from collections.abc import Callable

from qwq_mlx.bench.loops import our_samples, prompt_of, their_ids, their_passes
from qwq_mlx.bench.subject import OURS, THEIRS, Bench, Row, Target
from qwq_mlx.bench.timing import seconds_of

__all__ = ["bench_samples"]

_N_PROMPT = 64
_ONE_BY_ONE = "mlx-lm, one by one"


def bench_samples(bench: Bench) -> list[Row]:
    """Every target at every number of rows."""
    return bench.at_rows(lambda target, n_rows: _row(bench, target, n_rows))


def _row(bench: Bench, target: Target, n_rows: int) -> Row:
    prompt, n_tokens = prompt_of(_N_PROMPT, target.n_ids), bench.options.n_tokens
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: (
            n_rows * n_tokens / seconds_of(lambda: our_samples(target.module, prompt, target.n_ids, n_tokens, n_rows))
        ),
        THEIRS: lambda: n_rows * n_tokens / seconds_of(lambda: their_passes(target.theirs, prompt, n_tokens, n_rows)),
        _ONE_BY_ONE: lambda: n_tokens / seconds_of(lambda: list(their_ids(target.theirs, prompt, n_tokens))),
    }
    setting = f"{n_rows} sample{'s' if n_rows > 1 else ''} of {n_tokens} tokens behind {_N_PROMPT}"
    runs = bench.turns(contestants, f"{target.name}, {setting}")
    return Row(subject="samples", model=target.name, setting=setting, unit="tok/s", runs=runs)
