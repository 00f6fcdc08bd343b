"""The packed bytes are those of mx.quantize, whatever the weights look like and however the rows are cut."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from rows import PACKINGS, awkward_rows

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.fit import fit_block, min_max, open_stream
from qwq_mlx.quant.packing import Packing, round_to

MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@pytest.mark.parametrize("dtype", MX)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.mode}-{p.bits}-g{p.group_size}")
def test_min_max_is_bit_equal_to_mx_quantize(packing: Packing, dtype: str) -> None:
    raw = round_to(awkward_rows(), dtype)
    weights = mx.array(awkward_rows()).astype(MX[dtype])
    expected = mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=mx.cpu)
    found = min_max(raw, dtype, packing, stream=open_stream())
    assert found.codes.dtype == np.uint32 and found.codes.shape == expected[0].shape
    assert np.array_equal(found.codes, np.array(expected[0]))
    kept = [found.scales] + ([] if found.biases is None else [found.biases])
    assert len(kept) == len(expected) - 1
    for ours, theirs in zip(kept, expected[1:], strict=True):
        assert ours.tobytes() == np.array(theirs.view(mx.uint8)).tobytes()


def test_rows_fitted_in_blocks_are_the_rows_fitted_at_once() -> None:
    raw, stream = round_to(awkward_rows(), "BF16"), open_stream()
    whole = min_max(raw, "BF16", Packing(bits=3), stream=stream)
    parts = [fit_block(raw[i : i + 5], "BF16", Packing(bits=3), fit="min-max", stream=stream) for i in range(0, 12, 5)]
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert whole.biases is not None
    assert np.array_equal(np.concatenate([part.biases for part in parts]), whole.biases)


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p.is_affine], ids=lambda p: f"{p.bits}-g{p.group_size}")
def test_no_float32_weight_is_further_than_one_scale_from_its_packed_value(packing: Packing) -> None:
    rows = awkward_rows(1)
    found = min_max(rows, "F32", packing, stream=open_stream())
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
        min_max(np.zeros((2, 96), np.uint16), "BF16", Packing(), stream=open_stream())


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="fit is 'magic', expected one of min-max"):
        fit_block(np.zeros((2, 64), np.uint16), "BF16", Packing(), fit="magic", stream=open_stream())
