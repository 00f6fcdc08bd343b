"""The CUDA kernels of few rows beside float32, over shapes, groups and numbers of rows.

What they may be off by is what MLX's own kernel of many rows is: of codes unpacked to bfloat16, and a result rounded to
it. That is worked out here, for MLX 0.32.4 compiles its kernel 90 s for each shape.

Does not: measure their speed (`python -m qwq_mlx.bench rows` does).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.model.upstream import import_mlx

__all__ = ["check_few_rows"]

_N_ROWS = (1, 2, 5, 8, 25, 32)
# rows, columns, group size: few, for each kernel of each takes about a second to compile
_MATRICES = ((128, 16_384, 64), (896, 4864, 128), (16_384, 512, 64), (128, 512, 32))
_EPS = 1e-6
_MAX_LEFT = 1e-5  # only the order of sums differs
_MAX_SHARE = 1.1  # of that error
_SAME = "rows with other bits than alone"


def check_few_rows(subject: Subject) -> Result:
    """Errors against float32 are no larger than rounding makes them, and a row has the bits it has alone."""
    from qwq_mlx.model.kernels.device import cuda_kernels_run

    if not cuda_kernels_run():
        return Result(outcome="not checkable", found=f"this is {subject.backend}; the kernels run on NVIDIA GPUs")
    wrong, worst, n_cases = [], 0.0, 0
    for n_out, n_in, group in _MATRICES:
        errors = _errors(n_out, n_in, group)
        n_cases += len(errors)
        for name, (ours, limit) in errors.items():
            worst = max(worst, ours)
            if not ours <= limit:
                wrong.append(f"{n_out} x {n_in}, groups of {group}, {name}: {ours:.1e}, expected {limit:.1e} at most")
    return Result(
        outcome="failed" if wrong else "ok",
        found="; ".join(wrong[:3]) if wrong else f"{n_cases} products of {len(_MATRICES)} shapes, off by {worst:.1e}",
        expected=f"at most {_MAX_SHARE} of the error of rounding codes and results to bfloat16",
        values={"wrong": wrong, "largest error": worst, "n_cases": n_cases},
    )


def _errors(n_out: int, n_in: int, group: int) -> dict[str, tuple[float, float]]:
    """Our error and the largest that is allowed, for each product and number of rows."""
    from qwq_mlx.model.kernels import few_row_matmul as kernels
    from qwq_mlx.model.kernels.tiling import choose_tiling

    mx = import_mlx()
    tiling, pair_tiling = choose_tiling(n_out, n_in, group), choose_tiling(n_out, n_in, group, is_pair=True)
    assert tiling is not None and pair_tiling is not None, "the caller takes shapes that fit"
    random = mx.random.key(n_out + n_in + group)
    matrices = [_packed(each, n_out, n_in, group) for each in mx.random.split(random, 3)]
    first, second, _ = matrices
    bias = mx.random.normal((n_out,), mx.bfloat16, key=random)
    most = mx.random.normal((_N_ROWS[-1], n_in), mx.bfloat16, key=random)
    residual = mx.random.normal((_N_ROWS[-1], n_out), mx.bfloat16, key=random)
    exact = [_exact(most, matrix, group) for matrix in matrices]
    rounded = _product(most, mx.dequantize(*first, group_size=group, bits=4)).astype(mx.bfloat16)
    rms = mx.sqrt(mx.mean(mx.square(most.astype(mx.float32)), axis=1, keepdims=True) + _EPS)
    gate, up = exact[0] / rms, exact[1] / rms
    expected = {
        "product": exact[0],
        "product and residual": exact[0] + residual.astype(mx.float32),
        "third of three": exact[2] / rms + bias.astype(mx.float32),
        "gated pair": mx.sigmoid(gate) * gate * up,
    }
    biased = [(each, bias) for each in matrices]
    found: dict[str, tuple[float, float]] = {}
    alone: dict[str, Any] = {}
    for n_rows in _N_ROWS:
        x = most[:n_rows]
        left = kernels.ForNorm(x, _squares(x))
        ours = {
            "product": kernels.linear(x, first, tiling),
            "product and residual": kernels.linear(x, first, tiling, residual=residual[:n_rows]),
            "third of three": kernels.linears(left, biased, tiling, eps=_EPS, n_zeros=1)[0][2],
            "gated pair": kernels.swiglu_linears(left, first, second, pair_tiling, eps=_EPS),
        }
        limit = _MAX_SHARE * _off(rounded[:n_rows], expected["product"][:n_rows])
        for name, y in ours.items():
            # a gated pair has the errors of both; of the sums, the output's rounding is a part
            found[f"{name}, {n_rows} rows"] = _off(y, expected[name][:n_rows]), 2 * limit if "pair" in name else limit
            alone.setdefault(name, y[:1])
            found[f"{name}, {n_rows} rows, {_SAME}"] = float((y[:1] != alone[name]).sum().item()), 0.0
        if tiling.wide_from is None or tiling.n_slices > 1:
            y, left = kernels.linear_for_norm(x, first, tiling, residual=residual[:n_rows], norm=bias)
            apart = kernels.for_norm(y, bias)
            found[f"what is left for a norm, {n_rows} rows"] = (
                _off(left.weighted, (y * bias).astype(mx.float32)) + _off(left.squares, _squares(y)),
                _MAX_LEFT,
            )
            is_same = all(bool(mx.array_equal(*pair).item()) for pair in zip(left, apart, strict=True))
            found[f"other bits than a launch of its own leaves, {n_rows} rows"] = float(not is_same), 0.0
    return found


def _squares(rows: Any) -> Any:
    """The sums of squares of 16 values of a row each, as a product leaves them for a norm."""
    return import_mlx().square(rows.astype(import_mlx().float32)).reshape(len(rows), -1, 16).sum(axis=-1)


def _packed(key: Any, n_out: int, n_in: int, group: int) -> Any:
    from qwq_mlx.model.kernels.few_row_matmul import PackedMatrix

    mx = import_mlx()
    weight = mx.random.normal((n_out, n_in), mx.bfloat16, scale=n_in**-0.5, key=key)
    return PackedMatrix(*mx.quantize(weight, group_size=group, bits=4))


def _exact(x: Any, matrix: Any, group: int) -> Any:
    mx = import_mlx()
    floats = (each.astype(mx.float32) for each in matrix[1:])
    return _product(x, mx.dequantize(matrix[0], *floats, group_size=group, bits=4))


def _product(x: Any, matrix: Any) -> Any:
    """x @ matrix.T in float32, by numpy: a GPU may round what it multiplies (TF32)."""
    mx = import_mlx()
    rows, columns = (np.asarray(each.astype(mx.float32)) for each in (x, matrix))
    return mx.array(rows @ columns.T)


def _off(y: Any, expected: Any) -> float:
    mx = import_mlx()
    return float((mx.linalg.norm(y.astype(mx.float32) - expected) / mx.linalg.norm(expected)).item())
