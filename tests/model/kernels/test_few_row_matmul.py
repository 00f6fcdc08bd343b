"""The kernels of few rows, on a CPU by a C++ compiler, beside products with the unpacked matrix in float64.

Bodies, grids and sizes of memory are those that `few_row_matmul` launches. On a GPU `python -m qwq_mlx.doctor` holds
the kernels against numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulated_kernels import EmulatedKernels

from qwq_mlx.model.kernels import few_row_matmul, tiling
from qwq_mlx.model.kernels.few_row_matmul import ForNorm, PackedMatrix
from qwq_mlx.model.kernels.tiling import choose_tiling

EPS = 1e-5


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def small(emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices count as many rows from 256 on, and as long from 2,048."""
    monkeypatch.setattr(tiling, "_WIDE", 256)
    monkeypatch.setattr(tiling, "_LONG", 2048)
    emulated.put_in_place(monkeypatch)
    yield
    choose_tiling.cache_clear()
    few_row_matmul._kernel.cache_clear()


def _matrix(n_out: int, n_in: int, group: int, seed: int) -> PackedMatrix:
    weight = mx.random.normal((n_out, n_in), mx.bfloat16, scale=n_in**-0.5, key=mx.random.key(seed))
    return PackedMatrix(*mx.quantize(weight, group_size=group, bits=4))


def _exact(x: mx.array, matrix: PackedMatrix, group: int) -> Any:
    """In float64, with weights that are rounded to bfloat16 once."""
    return np.array(x.astype(mx.float32)).astype(np.float64) @ _unpacked(matrix, group).T


def _unpacked(matrix: PackedMatrix, group: int) -> Any:
    floats = (each.astype(mx.float32) for each in matrix[1:])
    unpacked = mx.dequantize(matrix.codes, *floats, group_size=group, bits=4).astype(mx.bfloat16).astype(mx.float32)
    return np.array(unpacked).astype(np.float64)


def _check(found: mx.array, expected: Any, *, rounded: int = 1) -> None:
    """rounded: roundings to bfloat16 on the way, 1.7e-3 each."""
    off = np.array(found.astype(mx.float32)) - expected
    assert np.linalg.norm(off) < 2.5e-3 * rounded**0.5 * np.linalg.norm(expected)


def _random(*shape: int) -> mx.array:
    return mx.random.normal(shape, mx.bfloat16, key=mx.random.key(sum(shape)))


@pytest.mark.parametrize(
    ("n_out", "n_in", "group", "wide_from", "numbers"),
    [
        pytest.param(32, 768, 64, None, (3, 17), id="narrow, of runs that are not shared out evenly"),
        pytest.param(256, 1536, 64, 5, (5, 19), id="wide from 5 rows on, with a last part that is shorter"),
        pytest.param(128, 3072, 64, 1, (9,), id="blocks share out the inner dimension"),
        pytest.param(256, 1024, 128, 5, (12,), id="groups of 128"),
    ],
)
def test_a_product_and_the_residual_and_each_row_as_alone(
    n_out: int,
    n_in: int,
    group: int,
    wide_from: int | None,
    numbers: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "_MAX_WARPS", {1: 10, 2: 2})  # a warp has turns
    chosen, matrix = choose_tiling(n_out, n_in, group), _matrix(n_out, n_in, group, seed=1)
    assert chosen is not None and chosen.wide_from == wide_from
    x, residual = _random(numbers[-1], n_in), _random(numbers[-1], n_out)
    expected = _exact(x, matrix, group)
    alone = few_row_matmul.linear(x[-1:], matrix, chosen)
    for n in numbers:
        found = few_row_matmul.linear(x[-n:], matrix, chosen)
        _check(found, expected[-n:])
        assert mx.array_equal(found[-1:], alone)
    found = few_row_matmul.linear(x, matrix, chosen, residual=residual)
    _check(found, expected + np.array(residual.astype(mx.float32)))


@pytest.mark.parametrize("n_out", [32, 256])
def test_three_products_of_one_norm_with_their_biases(n_out: int) -> None:
    """Of 256 rows one product would be wide from 5 rows of x on, three are not."""
    chosen, sizes = choose_tiling(n_out, 512, 64), (64, 32, 32)
    matrices = [(_matrix(size, 512, 64, seed), _random(size)) for seed, size in enumerate(sizes)]
    assert chosen is not None
    x, norm = _random(18, 512) * 5, _random(512)
    left = few_row_matmul.for_norm(x, norm)
    normed = _normed(x, norm)
    found = {
        n: few_row_matmul.linears(ForNorm(*(each[-n:] for each in left)), matrices, chosen, eps=EPS, n_zeros=500)
        for n in (1, 5, 18)
    }
    for place, (matrix, bias) in enumerate(matrices):
        expected = normed @ _unpacked(matrix, 64).T + np.array(bias.astype(mx.float32))
        _check(found[18][0][place], expected, rounded=2)
        assert mx.array_equal(found[18][0][place][-1:], found[1][0][place])
    assert all(zeros.tolist() == [0] * 500 for _, zeros in found.values())


def _normed(x: mx.array, norm: mx.array) -> Any:
    """RMSNorm in float64."""
    y = np.array(x.astype(mx.float32)).astype(np.float64)
    return y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + EPS) * np.array(norm.astype(mx.float32))


@pytest.mark.parametrize(("n_in", "numbers"), [(256, (1, 3, 19)), (3072, (1, 9))], ids=["one launch", "of slices"])
def test_a_product_leaves_what_the_norm_takes_of_it(n_in: int, numbers: tuple[int, ...]) -> None:
    """From 17 rows on a warp has two tiles."""
    chosen, matrix = choose_tiling(128, n_in, 64), _matrix(128, n_in, 64, seed=4)
    assert chosen is not None and (chosen.n_slices > 1) == (n_in == 3072)
    x, residual, norm = _random(numbers[-1], n_in), _random(numbers[-1], 128) * 3, _random(128)
    for n in numbers:
        y, left = few_row_matmul.linear_for_norm(x[-n:], matrix, chosen, residual=residual[-n:], norm=norm)
        assert mx.array_equal(y, few_row_matmul.linear(x[-n:], matrix, chosen, residual=residual[-n:]))
        apart = few_row_matmul.for_norm(y, norm)
        assert all(mx.array_equal(ours, theirs) for ours, theirs in zip(left, apart, strict=True))
        floats = y.astype(mx.float32)
        assert mx.array_equal(left.weighted, (floats * norm.astype(mx.float32)).astype(mx.bfloat16))
        assert mx.allclose(left.squares, mx.square(floats).reshape(n, 8, 16).sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("n_out", [64, 256], ids=["narrow", "wide from 5 rows on"])
def test_a_gated_pair_behind_a_norm(n_out: int) -> None:
    chosen = choose_tiling(n_out, 1024, 64, is_pair=True)
    gate, up = (_matrix(n_out, 1024, 64, seed) for seed in (5, 6))
    assert chosen is not None
    x, norm = _random(7, 1024) * 3, _random(1024)
    left, normed = few_row_matmul.for_norm(x, norm), _normed(x, norm)
    exact = [normed @ _unpacked(each, 64).T for each in (gate, up)]
    found = few_row_matmul.swiglu_linears(left, gate, up, chosen, eps=EPS)
    _check(found, exact[0] / (1 + np.exp(-exact[0])) * exact[1], rounded=3)
    last = ForNorm(*(each[-1:] for each in left))
    alone = few_row_matmul.swiglu_linears(last, gate, up, chosen, eps=EPS)
    assert mx.array_equal(alone, found[-1:])


def test_a_block_that_is_given_too_little_memory_is_noticed() -> None:
    """Of the emulator: what a kernel writes behind its memory would go unseen on a GPU."""
    chosen = choose_tiling(32, 512, 64)
    assert chosen is not None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="behind its shared memory"):
        patch.setattr(few_row_matmul, "shared_bytes", lambda *_, **__: 4000)  # of 4,608
        few_row_matmul.linear(_random(1, 512), _matrix(32, 512, 64, seed=1), chosen)
