"""How fast this machine is, as numbers for an issue; nothing here fails because it is slow.

Does not: compare with mlx-lm (`python -m qwq_mlx.bench` does).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from qwq_mlx.bench.loops import our_passes, prompt_of
from qwq_mlx.bench.machine import read_bandwidth
from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx

__all__ = ["check_bandwidth", "check_products", "check_row_costs"]

_ROWS = (1, 2, 4, 8, 16, 32)
_N_STEPS = 4
_N_WARM = 2
_N_PROMPT = 16
_BITS = (2, 3, 4, 5, 6, 8)
_SIDE = 2048
_ROUNDS = 5


def check_bandwidth(subject: Subject) -> Result:
    """How fast memory is read: what decoding one row is limited by."""
    n_bytes = read_bandwidth()
    return Result(outcome="ok", found=f"{n_bytes / 1e9:.1f} GB/s read", values={"bytes_per_s": round(n_bytes)})


def check_row_costs(subject: Subject) -> Result:
    """What a decode pass of several rows takes, relative to one row, by the bundled model."""
    seconds = {n_rows: _step_seconds(subject, n_rows) for n_rows in _ROWS}
    costs = {n_rows: each / seconds[1] for n_rows, each in seconds.items()}
    return Result(
        outcome="ok",
        found=f"one row {1e3 * seconds[1]:.1f} ms a pass; "
        + ", ".join(f"{n_rows} rows {cost:.2f}x" for n_rows, cost in costs.items() if n_rows > 1),
        values={"ms": {n_rows: round(1e3 * each, 3) for n_rows, each in seconds.items()}},
    )


def _step_seconds(subject: Subject, n_rows: int) -> float:
    """The median of a step. Raises what a row fails with."""
    model = subject.pocket
    prompt, n_ids = prompt_of(_N_PROMPT, model.tokenizer.n_ids), model.tokenizer.n_ids
    _, seconds = our_passes(model.module, prompt, n_ids, _N_WARM + _N_STEPS, seeds=range(n_rows))
    return statistics.median(seconds[_N_WARM:])  # the first fill the pipeline and may compile kernels


def check_products(subject: Subject) -> Result:
    """One vector times a packed matrix, by bits, and at 4 bits in both compute types: is our default the faster?"""
    compute_type = default_compute_type()
    other = "bfloat16" if compute_type == "float32" else "float32"
    by_bits = {bits: _product_seconds(bits, compute_type) for bits in _BITS}
    other_s = _product_seconds(4, other)
    milliseconds = {f"{bits} bits, {compute_type}": round(1e3 * each, 3) for bits, each in by_bits.items()}
    return Result(
        outcome="ok",
        found=f"4 bits {1e3 * by_bits[4]:.2f} ms in {compute_type}, {other} {other_s / by_bits[4]:.2f}x; "
        + ", ".join(f"{bits} bits {each / by_bits[4]:.2f}x" for bits, each in by_bits.items() if bits != 4),
        values={"ms": {**milliseconds, f"4 bits, {other}": round(1e3 * other_s, 3)}, "shape": [_SIDE, _SIDE]},
    )


def _product_seconds(bits: int, compute_type: str) -> float:
    mx = import_mlx()
    dtype = getattr(mx, compute_type)
    weight, scales, biases = mx.quantize(mx.random.normal((_SIDE, _SIDE), dtype), group_size=64, bits=bits)
    x = mx.random.normal((1, _SIDE), dtype)
    mx.eval(x, weight, scales, biases)

    def multiply() -> None:
        y = x
        for _ in range(4):  # each waits for the one before, as layers do
            y = mx.quantized_matmul(y, weight, scales, biases, transpose=True, group_size=64, bits=bits) / 64
        mx.eval(y)

    return _median_seconds(multiply) / 4


def _median_seconds(work: Callable[[], Any]) -> float:
    """The median of 5 after one warm-up."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
