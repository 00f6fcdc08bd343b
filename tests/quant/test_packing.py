"""Bits in memory, rounding to bfloat16, and the packings that MLX has."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.packing import DTYPES, MODES, Packing, float_values, pack_groups, round_to, unpack_codes

BITS = MODES["affine"][0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_come_back_from_rows_packed_as_little_endian_streams(bits: int, group: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 256), dtype=np.uint8)
    packed = pack_groups(np.ascontiguousarray(codes.reshape(-1, group).T), bits)
    assert packed.dtype == np.uint32 and packed.shape == (3 * 256 // group, group * bits // 32)
    rows = packed.reshape(3, 256 * bits // 32)
    stream = int.from_bytes(rows[1].tobytes(), "little")
    assert [(stream >> (j * bits)) & ((1 << bits) - 1) for j in range(256)] == codes[1].tolist()
    assert np.array_equal(unpack_codes(rows, bits), codes.astype(np.float32))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))))
@settings(max_examples=200, deadline=None)
def test_rounding_to_bfloat16_is_mlxs(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = np.array(mx.array(array).astype(mx.bfloat16).view(mx.uint16)) if values else np.zeros(0, np.uint16)
    assert np.array_equal(round_to(array, "BF16"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_weight_dtype_are_exact_in_float32(dtype: str) -> None:
    values = np.array([[0.0, -0.0, 1.5, -2.25, 2.0**-14, 96.0]], np.float32)  # exact in all three
    raw = round_to(values, dtype)
    assert raw.dtype == DTYPES[dtype]
    assert np.array_equal(float_values(raw, dtype), values)
    out = np.ones_like(values)
    assert float_values(raw, dtype, out) is out and np.array_equal(out, values)


def test_a_mode_that_mlx_lacks_is_refused() -> None:
    with pytest.raises(OptionError, match=r"mode is 'q4_k', expected one of affine, mxfp4, nvfp4, mxfp8\."):
        Packing(mode="q4_k")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 7}, r"bits is 7, expected 2, 3, 4, 5, 6, 8 in mode 'affine'\."),
        ({"bits": True}, r"bits is True, expected"),
        ({"group_size": 48}, r"group_size is 48, expected 32, 64, 128 in mode 'affine'\."),
        ({"mode": "mxfp4", "group_size": 64}, r"group_size is 64, expected 32 in mode 'mxfp4'\."),
    ],
)
def test_bits_and_groups_that_mlx_lacks_are_refused(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Packing(**values)


@pytest.mark.parametrize("mode", MODES)
def test_mlx_has_every_mode_bits_and_group_that_we_list(mode: str) -> None:
    weights = mx.ones((2, 256))
    for bits in MODES[mode][0]:
        for group in MODES[mode][1]:
            mx.eval(*mx.quantize(weights, group, bits, mode, stream=mx.cpu))
