"""Many questions of one model side by side, to their end: how many fit, whose seed is whose, and who failed.

Does not: keep anything on disk (`question_file` does), or feed the engine (`scheduler` does).
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from qwq_mlx.errors import BatchError, FitError, OptionError, error_text
from qwq_mlx.generate.request import Request
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.fit import machine_of
from qwq_mlx.model.memory.plan import MemoryPlan, ModelShape, Workload, plan_memory
from qwq_mlx.model.memory.sizes import cache_layers
from qwq_mlx.model.memory.splits import plan_tightest_rank
from qwq_mlx.model.ranks import ranks_of
from qwq_mlx.model.shared_prefix import MIN_SHARED
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.progress import ProgressBar
from qwq_mlx.trace.trace import Trace

__all__ = [
    "MAX_WIDTH",
    "check_width",
    "finish_all",
    "plan_rows",
    "plan_width",
    "question_seed",
    "settings_of_each",
    "shared_bytes",
]

T = TypeVar("T")

MAX_WIDTH = 8
"""Rows side by side where nobody asks for a number. On the CPU up to 7 rows draw what each draws alone, on CUDA up to
4; from 8 on the product is another (BLAS, another kernel: docs/benchmarks.md), so near-ties may fall otherwise, unless
the model is loaded with `reproducible`."""


def question_seed(seed: int, index: int) -> int:
    """The seed of question `index`: 32 bits of a sha256 of both, so neighbouring batches share no stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")


def settings_of_each(
    n: int,
    sampling: Sampling | Sequence[Sampling] | None,
    limits: Limits | Sequence[Limits] | None,
    thinking: Thinking | Sequence[Thinking] | None,
) -> list[tuple[Sampling | None, Limits | None, Thinking | None]]:
    """The settings of each of n questions, from one for all or one each; a seed for all makes another of each place.

    Raises OptionError where there are as many as not.
    """
    samplings = _for_each(sampling, n, "sampling")
    if isinstance(sampling, Sampling) and sampling.seed is not None:
        samplings = [replace(sampling, seed=question_seed(sampling.seed, index)) for index in range(n)]
    return list(zip(samplings, _for_each(limits, n, "limits"), _for_each(thinking, n, "thinking"), strict=True))


def _for_each(value: T | Sequence[T] | None, n: int, name: str) -> list[T | None]:
    if not isinstance(value, Sequence):
        return [value] * n
    if len(value) != n:
        raise OptionError(f"{name} has {len(value):,} entries for {n:,} questions, expected one for all or one each.")
    return list(value)


def check_width(width: int | None) -> None:
    """Raises OptionError for what is no number of rows."""
    if width is not None and (type(width) is not int or not 1 <= width <= 1_000):
        raise OptionError(f"width is {width!r}, expected a whole number from 1 to 1,000.")


def plan_rows(
    requests: Sequence[Request], width: int | None, *, limit_bytes: int | None, n_shared: int = 0
) -> MemoryPlan:
    """The plan of as many of these side by side as fit, at most `width`, or `MAX_WIDTH` where that is None.

    requests: at least one. limit_bytes: what the device gives; None refuses nothing. n_shared: leading positions that
      all of them have in common (`Stream.fork`).
    Raises OptionError for a width below 1; FitError naming the largest where the width that was asked for does not fit.
    """
    workloads = [request.plan.workload for request in requests]
    workload = replace(
        workloads[0],
        context=max(min(request.context, len(request.prompt_ids) + request.max_tokens) for request in requests),
        kv_bits=workloads[0].kv_bits if len({each.kv_bits for each in workloads}) == 1 else None,
        prefill_step=max(each.prefill_step for each in workloads),
        n_shared=n_shared if n_shared >= MIN_SHARED else 0,
    )
    return _widest(requests[0].model, workload, len(requests), width, limit_bytes)


def shared_bytes(request: Request, *, n_rows: int, n_shared: int) -> int:
    """What rows of such a request hold less than `plan_rows` says of them, as they have positions in common.

    A pass copies one layer of these positions for each row.
    """
    if n_shared < MIN_SHARED:
        return 0
    n_copies = n_rows - 1 - n_rows / cache_layers(request.model.config, replace(request.plan.workload, rank=0))
    return max(0, int(n_copies * n_shared * kv_bytes_here(request.plan)))


def kv_bytes_here(plan: MemoryPlan) -> int:
    """Of a position, in this process: the plan may be of another one that holds more or fewer layers, and binds."""
    split = plan.workload.split
    if split is None:
        return plan.kv_bytes_per_token
    return plan.kv_bytes_per_token * split.n_layers[0] // split.n_layers[plan.workload.rank]


def plan_width(
    model: LoadedModel, plan: MemoryPlan, n_questions: int, width: int | None, *, limit_bytes: int | None
) -> MemoryPlan:
    """As `plan_rows`, for questions that are not known yet: each may fill the context of a plan for one."""
    return _widest(model, replace(plan.workload, context=plan.context), max(1, n_questions), width, limit_bytes)


def _widest(
    model: LoadedModel, workload: Workload, n_rows: int, width: int | None, limit_bytes: int | None
) -> MemoryPlan:
    check_width(width)
    shape, ranks = ModelShape(config=model.config, packed=model.packed), ranks_of(model.module)

    def planned(n_sequences: int) -> MemoryPlan:
        asked = replace(workload, n_sequences=n_sequences)
        if ranks is not None and limit_bytes is not None and ranks.limits[0] is not None:
            held = ranks.limits[0] - limit_bytes
            return plan_tightest_rank(shape, asked, ranks.limits, backend=backend_name(), held_bytes=held)
        return plan_memory(shape, asked, limit_bytes=limit_bytes, backend=backend_name())

    most = min(n_rows, MAX_WIDTH if width is None else width)
    fitting = next((plan for n in range(most, 1, -1) if (plan := planned(n)).fits), planned(1))
    n_fitting = fitting.workload.n_sequences
    if width is not None and n_fitting < most:
        asked = planned(most)
        raise FitError(
            f"{most:,} rows side by side do not fit the memory of {machine_of(asked.workload)}:\n{asked.arithmetic()}\n"
            f"The largest `width` that fits is {n_fitting:,}; a smaller `context` makes room for more."
        )
    return fitting


def finish_all(
    streams: Sequence[Stream],
    *,
    plan: MemoryPlan,
    ask_answer: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trace]:
    """The traces of these runs in their order, as many side by side as the plan is for.

    progress: called with the runs that have ended and the tokens of all, after each step; None shows a bar on stderr
      where that is a terminal.
    Raises BatchError, after all others have ended, where any failed; it has the traces of all.
    """
    to_come, n_ended, n_tokens = deque(streams), 0, 0
    width, model = plan.workload.n_sequences, streams[0].request.model
    is_shown = progress is None and sys.stderr.isatty()
    with (
        ProgressBar(unit="question", is_shown=is_shown, stays=True) as bar,
        Scheduler(
            model, width=width, planned_bytes=plan.peak_bytes, ask_answer=ask_answer, drafts=streams[0].request.drafts
        ) as scheduler,
    ):
        tell = progress or _bar_progress(bar, len(streams))
        while to_come or scheduler.streams:
            while to_come and scheduler.has_room:
                scheduler.add(to_come.popleft())
            for stream in scheduler.step():
                n_ended += 1
                n_tokens += len(stream.run.steps)
            tell(n_ended, n_tokens + sum(len(stream.run.steps) for stream in scheduler.streams))
    failures = {index: stream.failure for index, stream in enumerate(streams) if stream.failure is not None}
    traces = [stream.trace() for stream in streams]
    if failures:
        which = "; ".join(f"question {index}: {error_text(failure)}" for index, failure in failures.items())
        raise BatchError(
            f"{len(failures):,} of {len(streams):,} questions were not answered to their end. {which} "
            "`.traces` has all, with what was written until then.",
            traces=traces,
            failures=failures,
        )
    return traces


def _bar_progress(bar: ProgressBar, n_questions: int) -> Callable[[int, int], None]:
    """Moves a bar, with the tokens a second of all rows since now."""
    started_s = time.perf_counter()

    def progress(n_ended: int, n_tokens: int) -> None:
        rate = n_tokens / (time.perf_counter() - started_s)
        bar.show("answering", n_ended, n_questions, note=f"{rate:,.1f} tok/s", is_begun=True)

    return progress
