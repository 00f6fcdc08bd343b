"""The error is that of MLX's own unpacked weights; NaN, infinity and lost pages are found where they are."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from rows import PACKINGS, awkward_rows

from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, float_values, round_to
from qwq_mlx.quant.rounding_error import PAGE_BYTES, block_error, count_zero_pages, first_non_finite, unpack


def min_max(raw: np.ndarray, dtype: str, packing: Packing) -> Packed:
    return fit_block(raw, dtype, packing, fit="min-max", stream=mx.new_stream(mx.cpu))[0]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-g{p.group_size}")
def test_unpacked_weights_are_mlxs(packing: Packing) -> None:
    raw, stream = round_to(awkward_rows(), "F32"), mx.new_stream(mx.cpu)
    packed = min_max(raw, "F32", packing)
    arrays = [mx.array(packed.codes), mx.array(packed.scales)]
    biases = None if packed.biases is None else mx.array(packed.biases)
    expected = mx.dequantize(
        *arrays, biases, packing.group_size, packing.bits, packing.mode, dtype=mx.float32, stream=mx.cpu
    )
    assert np.allclose(unpack(packed, packing, "F32", stream=stream), np.array(expected), rtol=1e-6, atol=1e-12)


def test_block_error_sums_what_a_plain_loop_sums() -> None:
    raw, packing, stream = round_to(awkward_rows(), "BF16"), Packing(bits=4, group_size=32), mx.new_stream(mx.cpu)
    packed = min_max(raw, "BF16", packing)
    found = block_error(raw, "BF16", packed, packing, stream=stream)
    weights = float_values(raw, "BF16").astype(np.float64)
    difference = unpack(packed, packing, "BF16", stream=stream) - weights
    assert found.error2 == pytest.approx((difference**2).sum(), rel=1e-5)
    assert found.weight2 == pytest.approx((weights**2).sum(), rel=1e-5)


def test_error_of_a_block_of_many_tiles_is_the_sum_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, packing, stream = round_to(awkward_rows(), "BF16"), Packing(), mx.new_stream(mx.cpu)
    packed = min_max(raw, "BF16", packing)
    whole = block_error(raw, "BF16", packed, packing, stream=stream)
    monkeypatch.setattr("qwq_mlx.quant.rounding_error._TILE", 512)  # two rows a tile
    cut = block_error(raw, "BF16", packed, packing, stream=stream)
    assert (cut.error2, cut.weight2) == pytest.approx((whole.error2, whole.weight2), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_non_finite_weight_is_found(dtype: str, value: float) -> None:
    raw = round_to(np.full((3, 40), -65000.0 if dtype == "F16" else -3e38, np.float32), dtype)
    assert first_non_finite(raw, dtype) is None
    bits = {"BF16": np.array([value], np.float32).view(np.uint32)[0] >> 16}
    for place in (57, 101):
        raw.reshape(-1)[place] = bits.get(dtype, value)
    assert first_non_finite(raw, dtype) == 57


def test_an_empty_block_has_nothing_non_finite() -> None:
    assert first_non_finite(np.zeros((0, 64), np.uint16), "BF16") is None


def test_pages_of_zeros_are_counted_only_where_whole() -> None:
    data = np.ones(5 * PAGE_BYTES + 100, np.uint8)
    assert count_zero_pages(data) == 0
    data[PAGE_BYTES : 3 * PAGE_BYTES] = 0
    data[4 * PAGE_BYTES] = 0  # one zero byte is no zero page
    data[5 * PAGE_BYTES :] = 0  # a part of a page
    assert count_zero_pages(data) == 2
    assert count_zero_pages(data[:100]) == 0


def test_a_zero_page_is_found_wherever_it_begins_and_across_two_blocks() -> None:
    for start in range(0, 3 * PAGE_BYTES, 97):
        data = np.ones(5 * PAGE_BYTES, np.uint8)
        data[start : start + PAGE_BYTES] = 0
        assert count_zero_pages(data) == 1
        for cut in (2 * PAGE_BYTES, 2 * PAGE_BYTES + 2 * 480):  # the second: a block that is no whole number of pages
            assert 1 <= count_zero_pages(data[:cut]) + count_zero_pages(data[cut:]) <= 2


def test_packed_keeps_no_bias_outside_affine_mode() -> None:
    packed = min_max(round_to(awkward_rows(), "BF16"), "BF16", Packing(mode="mxfp8", bits=8, group_size=32))
    assert isinstance(packed, Packed) and packed.biases is None and packed.scales.dtype == np.uint8
