"""What passes of one model cost on this machine: by rows, to wait for ids, and an id of a draft model.

The passes are those of the decoder itself, over one row with drafts that are always wrong. Where a pass over M rows
costs M times one, as on a CPU, drafts can never pay, and the rest is not measured.

Does not: keep what it measured (`generate.drafting` does).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.draft_length import PassCosts
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.engine.speculative import Draft
from qwq_mlx.options import NEUTRAL, Sampling

__all__ = ["measure_costs"]

_CONTEXT = 300  # ids in the cache meanwhile; it does not grow while the passes are timed
_ROWS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
_N_PASSES = 5  # of which the median counts
_LINEAR = 0.9  # of M times one row: too costly to ever pay
_N_DRAFTED = 4


class _WrongDrafts:
    """Drafts a fixed number of ids that nobody draws for long."""

    def __init__(self) -> None:
        self.length: int | None = 0

    def is_due(self, rows: Sequence[Row]) -> bool:
        return self.length is not None

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        n = self.length or 0
        return [Draft((row.n_output % 7,) * min(n, row.most_drafts), "") for row in rows]

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        pass


def measure_costs(
    module: Any,
    *,
    n_ids: int,
    kv_bits: int | None = None,
    drafter: ModelDrafter | None = None,
    most_rows: int = _ROWS[-1],
    clock: Callable[[], float] = time.perf_counter,
) -> PassCosts:
    """Measure them; takes some 100 passes, on a CPU about 30.

    module: mlx_lm's Qwen2. drafter: of a draft model. most_rows: that a pass may have. clock: seconds.
    """
    drafts = _WrongDrafts()
    decoder = Decoder(module, n_ids=n_ids, drafts=drafts)
    row = Row(Sampler(Sampling(temperature=0.0).resolve(NEUTRAL), seed=0), cache=new_cache(module, kv_bits))
    for _ in decoder.prefill(row, [place % min(n_ids, 50) for place in range(_CONTEXT)], chunk=_CONTEXT):
        pass

    def seconds(length: int | None) -> float:
        """Of a pass with this many drafts; None is the pipelined loop."""
        drafts.length = length
        taken = []
        for _ in range(_N_PASSES + 2):
            started = clock()
            decoder.draw(row)
            taken.append(clock() - started)
            if length is not None:
                row.rewind(row.n_output)  # also from drafts that happened to be right
        return statistics.median(taken[2:])

    plain_s = seconds(None)
    row.rewind(row.n_output)
    sync_s = max(0.0, seconds(0) - plain_s)
    known, n_costly = {1: plain_s}, 0
    for n_rows in (each for each in _ROWS if each <= most_rows):
        known[n_rows] = max(known[max(known)], seconds(n_rows - 1) - sync_s)
        n_costly = n_costly + 1 if known[n_rows] > _LINEAR * n_rows * plain_s else 0
        if n_costly == 2:
            break
    draft_s = 0.0
    if drafter is not None:
        taken = []
        for _ in range(_N_PASSES + 1):
            started = clock()
            drafter.guess([row], [_N_DRAFTED])
            taken.append((clock() - started) / _N_DRAFTED)
        draft_s = statistics.median(taken[1:])
    return PassCosts(by_rows=_filled(known), sync_s=sync_s, draft_s=draft_s)


def _filled(known: dict[int, float]) -> tuple[float, ...]:
    """Every number of rows from 1 on, those between two measured ones by a straight line."""
    rows = sorted(known)
    filled = [known[1]]
    for low, high in itertools.pairwise(rows):
        step = (known[high] - known[low]) / (high - low)
        filled += [known[low] + step * n for n in range(1, high - low + 1)]
    return tuple(filled)
