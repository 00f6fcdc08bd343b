"""Least squares: never worse than min/max in any group, close to the best line there is, the same however it is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import PACKINGS, awkward_rows, weighted_fit

from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.packing import Packed, Packing, float_values, round_to
from qwq_mlx.quant.rounding_error import unpack

AFFINE = [packing for packing in PACKINGS if packing.is_affine]
STARTS = ((0.0, 0.0), (-0.4, 0.4), (-1.2, -0.4), (-0.8, 0.0))
MOVES = ((0.0, 0.12), (0.15, -0.12))


def name_of(packing: Packing) -> str:
    return f"{packing.bits}-g{packing.group_size}"


def fitted(raw: np.ndarray, dtype: str, packing: Packing, fit: str, importance: np.ndarray | None = None) -> Packed:
    if importance is not None:
        return weighted_fit(raw, dtype, packing, importance)
    return fit_block(raw, dtype, packing, fit=fit)[0]


def errors(raw: np.ndarray, dtype: str, packed: Packed, packing: Packing, importance: Any = 1.0) -> np.ndarray:
    """Sum of (weighted) squared errors of each group, float64."""
    difference = unpack(packed, packing, dtype, stream=None).astype(float) - float_values(raw, dtype)
    return (importance * difference**2).reshape(-1, packing.group_size).sum(axis=1)


def same(one: Packed, other: Packed) -> bool:
    assert one.biases is not None and other.biases is not None
    pairs = ((one.codes, other.codes), (one.scales, other.scales), (one.biases, other.biases))
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("packing", AFFINE, ids=name_of)
def test_no_group_is_worse_than_by_min_max(packing: Packing, dtype: str) -> None:
    raw = round_to(awkward_rows(3), dtype)
    importance = np.random.default_rng(0).uniform(0.01, 3, 256).astype(np.float32) ** 2
    for fit, weights in (("least-squares", None), ("calibrated", importance)):
        counted = 1.0 if weights is None else weights
        least = errors(raw, dtype, fitted(raw, dtype, packing, fit, weights), packing, counted)
        plain = errors(raw, dtype, fitted(raw, dtype, packing, "min-max"), packing, counted)
        assert np.all(least <= plain * (1 + 1e-5) + 1e-30)
        assert least.sum() < plain.sum()


@given(st.integers(0, 2**32 - 1), st.sampled_from(AFFINE))
@settings(max_examples=60, deadline=None)
def test_no_group_of_any_finite_bfloat16_is_worse(seed: int, packing: Packing) -> None:
    raw = np.random.default_rng(seed).integers(0, 1 << 16, (2, 128), np.uint16)
    raw[(raw & 0x7F80) > 0x5E00] &= 0x9FFF  # up to 2**61: squares stay finite
    least = errors(raw, "BF16", fitted(raw, "BF16", packing, "least-squares"), packing)
    plain = errors(raw, "BF16", fitted(raw, "BF16", packing, "min-max"), packing)
    assert np.all(least <= plain * (1 + 1e-4) + 1e-30)


@pytest.mark.parametrize(
    ("packing", "gain"),
    [
        (Packing(bits=2), 0.32),
        (Packing(bits=3), 0.23),
        (Packing(bits=4), 0.17),
        (Packing(bits=4, group_size=32), 0.22),
        (Packing(bits=4, group_size=128), 0.14),
        (Packing(bits=8), 0.3),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Packing) else str(value),
)
def test_squared_error_of_normal_weights_falls_by_a_sixth_at_4_bits_and_more_below(
    packing: Packing, gain: float
) -> None:
    raw = round_to((0.02 * np.random.default_rng(1).standard_normal((64, 4096))).astype(np.float32), "BF16")
    least = errors(raw, "BF16", fitted(raw, "BF16", packing, "least-squares"), packing).sum()
    plain = errors(raw, "BF16", fitted(raw, "BF16", packing, "min-max"), packing).sum()
    assert least < (1 - gain) * plain


def twin(weights: np.ndarray, importance: np.ndarray, bits: int) -> tuple[float, float]:
    """Scale and bias of one group in plain float64: the same moves, all sums written out."""
    top = (1 << bits) - 1
    edges = sorted((float(weights.min()), float(weights.max())), key=abs)
    scale = (edges[1] - edges[0]) / top * -1
    scale = edges[1] / np.rint(edges[1] / scale)
    bias, best = edges[1], -1.0
    first = scale, bias
    for move in STARTS + MOVES:
        longer, shift = move
        factor = 1 + longer / top
        size, zero = first if move in STARTS else (scale, bias)
        tried, start = size * factor, zero + size * (top / 2 * (1 - factor) + shift)
        codes = np.clip(np.rint((weights - start) / tried), 0, top)
        total = importance.sum()
        mean_code, mean = (importance * codes).sum() / total, (importance * weights).sum() / total
        variance = (importance * (codes - mean_code) ** 2).sum()
        covariance = (importance * (codes - mean_code) * (weights - mean)).sum()
        if variance > 0 and covariance**2 / variance > best:
            best, scale = covariance**2 / variance, covariance / variance
            bias = mean - scale * mean_code
    return scale, bias


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_lines_are_those_of_a_plain_loop(bits: int, is_weighted: bool) -> None:
    """float32 sums may decide a near tie otherwise, so not in every group; the errors agree all the same."""
    random, packing = np.random.default_rng(bits), Packing(bits=bits)
    rows = (0.02 * random.standard_normal((40, 256))).astype(np.float32)
    importance = random.uniform(0.1, 4, 256).astype(np.float32) if is_weighted else None
    found = fitted(rows, "F32", packing, "calibrated", importance)
    assert found.biases is not None
    groups = rows.reshape(-1, 64).astype(float)
    counted = np.ones((len(groups), 64)) if importance is None else np.tile(importance.reshape(-1, 64), (40, 1))
    lines = np.array([twin(*pair, bits) for pair in zip(groups, counted, strict=True)])
    ours = np.stack([found.scales.reshape(-1), found.biases.reshape(-1)], axis=1)
    assert np.isclose(ours, lines, rtol=1e-4, atol=1e-6).all(axis=1).mean() > 0.85
    codes = np.clip(np.rint((groups - lines[:, 1:]) / lines[:, :1]), 0, (1 << bits) - 1)
    expected = (counted * (codes * lines[:, :1] + lines[:, 1:] - groups) ** 2).sum()
    total = errors(rows, "F32", found, packing, 1.0 if importance is None else importance).sum()
    assert total == pytest.approx(expected, rel=0.006)


def test_the_error_is_close_to_that_of_the_best_line_of_an_exhaustive_search() -> None:
    rows, packing = (
        (0.02 * np.random.default_rng(5).standard_normal((20, 32))).astype(np.float32),
        Packing(bits=2, group_size=32),
    )
    best = np.full(20, np.inf)
    for low, width in itertools.product(np.linspace(-0.08, 0, 81), np.linspace(0.02, 0.12, 101)):
        codes = np.clip(np.rint((rows - low) / (width / 3)), 0, 3)
        mean_code, mean = codes.mean(axis=1, keepdims=True), rows.mean(axis=1, keepdims=True)
        variance = np.maximum(((codes - mean_code) ** 2).sum(axis=1), 1e-9)
        covariance = ((codes - mean_code) * (rows - mean)).sum(axis=1)
        best = np.minimum(best, ((rows - mean) ** 2).sum(axis=1) - covariance**2 / variance)
    least = errors(rows, "F32", fitted(rows, "F32", packing, "least-squares"), packing)
    plain = errors(rows, "F32", fitted(rows, "F32", packing, "min-max"), packing)
    assert np.all(least > best * 0.995)  # the search is the bound, but for its grid
    assert least.sum() - best.sum() < 0.2 * (plain.sum() - best.sum())


def test_blocks_do_not_change_a_byte() -> None:
    """Groups that are fitted beside others have the bytes that they have alone."""
    raw, packing = round_to(awkward_rows(), "BF16"), Packing(bits=3)
    whole = fitted(raw, "BF16", packing, "calibrated")
    assert whole.biases is not None
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = fitted(raw[rows], "BF16", packing, "calibrated")
        assert same(part, Packed(whole.codes[rows], whole.scales[rows], whole.biases[rows]))


def test_equal_importance_is_none_and_a_heavy_channel_is_hit_closer() -> None:
    raw, packing = round_to(awkward_rows(), "F32"), Packing(bits=2)
    plain = fitted(raw, "F32", packing, "least-squares")
    assert same(plain, fitted(raw, "F32", packing, "calibrated"))
    assert same(plain, fitted(raw, "F32", packing, "calibrated", np.ones(256, np.float32)))
    heavy = np.ones(256, np.float32)
    heavy[::64] = 1000
    found = fitted(raw, "F32", packing, "calibrated", heavy)

    def distance(packed: Packed) -> float:
        unpacked = unpack(packed, packing, "F32", stream=None)
        return float(np.abs(unpacked[0, ::64] - raw[0, ::64]).max())

    assert distance(found) < 0.2 * distance(plain)
