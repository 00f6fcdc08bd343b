"""What passes of one model cost on this machine: by rows, to wait for ids, and an id of a draft model.

The passes are those of the decoder itself, over one row with drafts that are always wrong, with few ids in the cache
and with many. Where a pass over M rows costs M times one, as on a CPU, drafts can never pay, and the rest is not
measured.

Does not: keep what it measured (`generate.drafting` does).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.draft_length import CostsAt, PassCosts
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.kv_cache import Layer, filled_cache, layers_of, new_cache
from qwq_mlx.engine.model_runner import feed_prompt, run_pass
from qwq_mlx.engine.ranks.leader import leader_of
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.engine.speculative import Draft
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS, n_positions
from qwq_mlx.model.rotations import rotations_in_place
from qwq_mlx.options import NEUTRAL, Sampling

__all__ = ["LONG_CONTEXT", "compile_kernels", "measure_costs"]

LONG_CONTEXT = 4_100
"""Ids in the cache in the second measurement, where a row may have more."""

_CONTEXT = 300  # ids in the cache meanwhile; it does not grow while the passes are timed
_ROWS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
_ROWS_OF_LONG = (2, 4, 8, 16, 32)
_N_PASSES = 8  # of which the middle half counts
_LINEAR = 0.9  # of M times one row: too costly to ever pay
_N_DRAFTED = 4


def compile_kernels(module: Any, most_rows: int) -> None:
    """Feed a prompt, and run passes of one row and of several, most_rows at most, where a model's rows attend in place.

    On CUDA each process compiles the kernels anew, for each 8 rows, which takes seconds that a run would wait in its
    midst. Nothing elsewhere, and nothing of a model that other processes have a part of.
    """
    if rotations_in_place(module) is None or leader_of(module) is not None:
        return
    cache = new_cache(module)
    feed_prompt(module, cache, [0] * (2 * MAX_FEW_ROWS))
    for n_rows in sorted({1, *range(8, most_rows + 1, 8), most_rows}):
        mx.eval(run_pass(module, mx.zeros((1, n_rows), mx.uint32), [cache], [n_rows], batches_from=1))


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
    most_context: int = LONG_CONTEXT,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CostsAt]:
    """Measure them; takes some 250 passes, on a CPU about 50.

    module: mlx_lm's Qwen2. drafter: of a draft model. most_rows: that a pass may have. most_context: positions that a
    row may have. clock: seconds.
    """
    timer = _Timer(module, n_ids, kv_bits, clock)
    known, sync_s = timer.by_rows([each for each in _ROWS if each <= most_rows])
    draft_s = 0.0
    if drafter is not None:
        taken = []
        for _ in range(_N_PASSES + 1):
            started = clock()
            drafter.guess([timer.row], [_N_DRAFTED])
            taken.append((clock() - started) / _N_DRAFTED)
        draft_s = _typical(taken[1:])
    measured = [CostsAt(context=_CONTEXT, costs=PassCosts(by_rows=_filled(known), sync_s=sync_s, draft_s=draft_s))]
    may_pay = any(seconds <= _LINEAR * n_rows * known[1] for n_rows, seconds in known.items() if n_rows > 1)
    if may_pay and most_context > LONG_CONTEXT:
        timer.lengthen(LONG_CONTEXT)
        known, sync_s = timer.by_rows([each for each in _ROWS_OF_LONG if each <= max(known)])
        costs = PassCosts(by_rows=_filled(known), sync_s=sync_s, draft_s=draft_s)
        measured.append(CostsAt(context=LONG_CONTEXT, costs=costs))
    return measured


class _Timer:
    """Times passes over one row. clock: seconds."""

    def __init__(self, module: Any, n_ids: int, kv_bits: int | None, clock: Callable[[], float]) -> None:
        self._module, self._kv_bits, self._clock = module, kv_bits, clock
        self._n_ids = min(n_ids, 50)
        self._drafts = _WrongDrafts()
        self._decoder = Decoder(module, n_ids=n_ids, drafts=self._drafts)
        sampler = Sampler(Sampling(temperature=0.0).resolve(NEUTRAL), seed=0)
        self.row = Row(sampler, cache=new_cache(module, kv_bits))
        for _ in self._decoder.prefill(self.row, self._prompt(_CONTEXT), chunk=_CONTEXT):
            pass

    def _prompt(self, n: int) -> list[int]:
        return [place % self._n_ids for place in range(n)]

    def lengthen(self, context: int) -> None:
        """Let the row hold so many ids: what it holds again and again, for the time does not depend on the values."""
        if leader_of(self._module) is not None:  # every process has a part of the cache; so they are fed
            self.row.cache = new_cache(self._module, self._kv_bits)
            for _ in self._decoder.prefill(self.row, self._prompt(context), chunk=512):
                pass
            return
        layers = []
        for layer in layers_of(self.row.cache, _CONTEXT - 1):
            arrays = {name: _repeated(array, context - 1) for name, array in layer.arrays.items()}
            mx.eval(list(arrays.values()))
            layers.append(Layer(arrays, n_positions(context + _ROWS[-1])))
        self.row.cache = filled_cache(self._module, layers, self._kv_bits)
        self.row.start(self._prompt(context))

    def by_rows(self, n_rows_each: Sequence[int]) -> tuple[dict[int, float], float]:
        """Seconds of a pass over 1 and these numbers of rows, while they may pay; and of a wait for ids."""
        plain_s = self._seconds(None)
        self.row.rewind(self.row.n_output)
        sync_s = max(0.0, self._seconds(0) - plain_s)
        known, n_costly = {1: plain_s}, 0
        for n_rows in n_rows_each:
            known[n_rows] = max(known[max(known)], self._seconds(n_rows - 1) - sync_s)
            n_costly = n_costly + 1 if known[n_rows] > _LINEAR * n_rows * plain_s else 0
            if n_costly == 2:
                break
        return known, sync_s

    def _seconds(self, length: int | None) -> float:
        """Of a pass with this many drafts; None is the pipelined loop."""
        self._drafts.length = length
        taken = []
        for _ in range(_N_PASSES + 2):
            started = self._clock()
            self._decoder.draw(self.row)
            taken.append(self._clock() - started)
            if length is not None:
                self.row.rewind(self.row.n_output)  # also from drafts that happened to be right
        return _typical(taken[2:])


def _typical(seconds: Sequence[float]) -> float:
    """The mean of the middle half: pipelined passes take short and long ones by turns, of which a median is either."""
    quarter = len(seconds) // 4
    return statistics.fmean(sorted(seconds)[quarter : len(seconds) - quarter])


def _repeated(array: mx.array, n: int) -> mx.array:
    """(1, heads, n, width) of an array with fewer positions."""
    n_times = -(-n // array.shape[2])
    return mx.concatenate([array] * n_times, axis=2)[:, :, :n]


def _filled(known: dict[int, float]) -> tuple[float, ...]:
    """Every number of rows from 1 on, those between two measured ones by a straight line."""
    rows = sorted(known)
    filled = [known[1]]
    for low, high in itertools.pairwise(rows):
        step = (known[high] - known[low]) / (high - low)
        filled += [known[low] + step * n for n in range(1, high - low + 1)]
    return tuple(filled)
