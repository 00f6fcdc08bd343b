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
_MATRICES = ((128, 5120, 64), (896, 4864, 128), (16_384, 512, 32))
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

    mx = import_mlx()
    tiling, pair_tiling = (
        kernels.choose_tiling(n_out, n_in, group),
        kernels.choose_tiling(n_out, n_in, group, is_pair=True),
    )
    assert tiling is not None and pair_tiling is not None, "the caller takes shapes that fit"
    random = mx.random.key(n_out + n_in + group)
    first, second, third = (_packed(each, n_out, n_in, group) for each in mx.random.split(random, 3))
    bias = mx.random.normal((n_out,), mx.bfloat16, key=random)
    most = mx.random.normal((_N_ROWS[-1], n_in), mx.bfloat16, key=random)
    residual = mx.random.normal((_N_ROWS[-1], n_out), mx.bfloat16, key=random)
    exact = [_exact(most, matrix, group) for matrix in (first, second, third)]
    rounded = _product(most, mx.dequantize(*first, group_size=group, bits=4)).astype(mx.bfloat16)
    expected = {
        "product": exact[0],
        "product and residual": exact[0] + residual.astype(mx.float32),
        "third of three": exact[2] + bias.astype(mx.float32),
        "gated pair": mx.sigmoid(exact[0]) * exact[0] * exact[1],
    }
    found: dict[str, tuple[float, float]] = {}
    alone: dict[str, Any] = {}
    for n_rows in _N_ROWS:
        x = most[:n_rows]
        ours = {
            "product": kernels.linear(x, first, tiling),
            "product and residual": kernels.linear(x, first, tiling, residual=residual[:n_rows]),
            "third of three": kernels.linears(x, [(first, bias), (second, bias), (third, bias)], tiling)[2],
            "gated pair": kernels.swiglu_linears(x, first, second, pair_tiling),
        }
        limit = _MAX_SHARE * _off(rounded[:n_rows], expected["product"][:n_rows])
        for name, y in ours.items():
            # a gated pair has the errors of both; of the sums, the output's rounding is a part
            found[f"{name}, {n_rows} rows"] = _off(y, expected[name][:n_rows]), 2 * limit if "pair" in name else limit
            alone.setdefault(name, y[:1])
            found[f"{name}, {n_rows} rows, {_SAME}"] = float((y[:1] != alone[name]).sum().item()), 0.0
    return found


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
