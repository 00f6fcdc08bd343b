"""The packed bytes are those of mx.quantize, whatever the weights look like and however the rows are cut."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import PACKINGS, awkward_rows

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.packing import Packed, Packing, round_to
from qwq_mlx.quant.rounding_error import block_error

MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def min_max(raw: np.ndarray, dtype: str, packing: Packing) -> Packed:
    return fit_block(raw, dtype, packing, fit="min-max", stream=mx.new_stream(mx.cpu))[0]


@pytest.mark.parametrize("dtype", MX)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-g{p.group_size}")
def test_min_max_is_bit_equal_to_mx_quantize(packing: Packing, dtype: str) -> None:
    raw = round_to(awkward_rows(), dtype)
    weights = mx.array(awkward_rows()).astype(MX[dtype])
    expected = mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=mx.cpu)
    found = min_max(raw, dtype, packing)
    assert found.codes.dtype == np.uint32 and found.codes.shape == expected[0].shape
    assert np.array_equal(found.codes, np.array(expected[0]))
    kept = [found.scales] + ([] if found.biases is None else [found.biases])
    assert len(kept) == len(expected) - 1
    for ours, theirs in zip(kept, expected[1:], strict=True):
        assert ours.tobytes() == np.array(theirs.view(mx.uint8)).tobytes()


def test_rows_fitted_in_blocks_are_the_rows_fitted_at_once() -> None:
    raw = round_to(awkward_rows(), "BF16")
    whole = min_max(raw, "BF16", Packing(bits=3))
    parts = [min_max(raw[i : i + 5], "BF16", Packing(bits=3)) for i in range(0, 12, 5)]
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert whole.biases is not None
    assert np.array_equal(np.concatenate([part.biases for part in parts]), whole.biases)


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p.is_affine], ids=lambda p: f"{p.bits}-g{p.group_size}")
def test_no_float32_weight_is_further_than_one_scale_from_its_packed_value(packing: Packing) -> None:
    rows = awkward_rows(1)
    found = min_max(rows, "F32", packing)
    unpacked = mx.dequantize(
        mx.array(found.codes),
        mx.array(found.scales),
        mx.array(found.biases),
        packing.group_size,
        packing.bits,
        stream=mx.cpu,
    )
    distance = np.abs(np.array(unpacked) - rows)
    scales = np.repeat(np.abs(found.scales), packing.group_size, axis=1)
    assert np.all(distance <= scales * (1 + 1e-5))


def test_a_width_that_the_group_does_not_divide_is_refused() -> None:
    with pytest.raises(OptionError, match="a row has 96 weights, expected a multiple of the group size 64"):
        min_max(np.zeros((2, 96), np.uint16), "BF16", Packing())


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-g{p.group_size}")
def test_the_error_is_that_of_the_packed_block(packing: Packing) -> None:
    raw = round_to(awkward_rows(2), "BF16")
    packed, error = fit_block(raw, "BF16", packing, fit="min-max", stream=mx.new_stream(mx.cpu))
    expected = block_error(raw, "BF16", packed, packing, stream=mx.new_stream(mx.cpu))
    assert (error.error2, error.weight2) == pytest.approx((expected.error2, expected.weight2), rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([p for p in PACKINGS if p.is_affine]))
@settings(max_examples=150, deadline=None)
def test_min_max_is_bit_equal_on_any_finite_bfloat16(seed: int, packing: Packing) -> None:
    """Random bits: every exponent, both zeros, subnormal numbers; only NaN and infinity are left out."""
    raw = np.random.default_rng(seed).integers(0, 1 << 16, (2, 128), np.uint16)
    raw[(raw & 0x7F80) == 0x7F80] = 0
    raw[(raw & 0x7F80) > 0x7E00] &= 0xBFFF  # beyond 2**125 max - min overflows
    expected = mx.quantize(mx.array(raw).view(mx.bfloat16), packing.group_size, packing.bits, stream=mx.cpu)
    found = min_max(raw, "BF16", packing)
    assert np.array_equal(found.codes, np.array(expected[0]))
    assert np.array_equal(found.scales, np.array(expected[1].view(mx.uint16)))
    assert found.biases is not None and np.array_equal(found.biases, np.array(expected[2].view(mx.uint16)))


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="fit is 'magic', expected one of min-max"):
        fit_block(np.zeros((2, 64), np.uint16), "BF16", Packing(), fit="magic")


@pytest.mark.parametrize("packing", [p for p in PACKINGS if not p.is_affine], ids=lambda p: p.mode)
def test_a_mode_beside_affine_knows_only_min_max(packing: Packing) -> None:
    with pytest.raises(OptionError, match=f"fit is 'least-squares', but mode '{packing.mode}' has only 'min-max'"):
        fit_block(np.zeros((2, 64), np.uint16), "BF16", packing, fit="least-squares")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", MX)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-g{p.group_size}")
def test_a_weight_that_is_no_number_shows_in_the_sum_of_squares(packing: Packing, dtype: str, value: float) -> None:
    """What the conversion relies on to look for one: a sweep over every weight less."""
    rows = awkward_rows(3)
    rows[-1, -1] = value
    raw = round_to(rows, "F32" if dtype == "BF16" else dtype)
    raw = (raw.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else raw
    for fit in ("min-max", "least-squares") if packing.is_affine else ("min-max",):
        assert not np.isfinite(fit_block(raw, dtype, packing, fit=fit, stream=mx.new_stream(mx.cpu))[1].weight2)
