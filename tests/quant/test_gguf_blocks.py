"""GGUF's block formats against the gguf package: bit for bit, decoded and as MLX groups."""

from __future__ import annotations

import builtins
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf_files import random_blocks

from qwq_mlx.errors import ConversionError
from qwq_mlx.files.gguf.types import TYPES
from qwq_mlx.quant.gguf_blocks import check_decoder, decode_block, decode_gguf, packing_that_holds, repack
from qwq_mlx.quant.modes import Packing
from qwq_mlx.quant.rounding_error import unpack

HELD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")
LEGACY = HELD[:5]


def blocks(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """24 rows of 1,024 weights, and what the gguf package makes of them."""
    raw = random_blocks(kind, (24, 1024), seed)
    return raw, dequantize(raw, GGMLQuantizationType[kind])


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES}
    ours = {number: (each.name, each.n_weights, each.n_bytes) for number, each in TYPES.items()}
    assert ours.items() <= theirs.items()
    assert {theirs[number][0] for number in theirs.keys() - ours.keys()} == {"NVFP4", "Q1_0"}


@pytest.mark.parametrize("kind", HELD)
def test_blocks_decode_and_repack_to_the_very_weights(kind: str) -> None:
    raw, expected = blocks(kind)
    packing = packing_that_holds(kind)
    assert packing is not None
    assert np.array_equal(decode_gguf(raw, kind), expected)
    packed = repack(raw, kind, "F32")
    assert np.array_equal(unpack(packed, packing, "F32", stream=None), expected)
    assert packed.biases is not None
    by_mlx = mx.dequantize(mx.array(packed.codes), mx.array(packed.scales), mx.array(packed.biases), 32, packing.bits)
    assert np.allclose(np.array(by_mlx), expected, rtol=1e-6, atol=1e-7)  # MLX may fuse the product and the sum


@pytest.mark.parametrize("kind", LEGACY)
def test_float16_holds_the_scales_of_the_old_types_exactly(kind: str) -> None:
    raw, expected = blocks(kind, seed=1)
    packing = packing_that_holds(kind)
    assert packing is not None
    assert np.array_equal(unpack(repack(raw, kind, "F16"), packing, "F16", stream=None), expected)


@pytest.mark.parametrize(("stored", "least", "most"), [("F16", 1e-4, 4e-4), ("BF16", 1e-3, 6e-3)])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_a_product_of_float16_and_6_bits_loses_what_was_measured(
    kind: str, stored: str, least: float, most: float
) -> None:
    raw, expected = blocks(kind, seed=2)
    packing = packing_that_holds(kind)
    assert packing is not None
    error = unpack(repack(raw, kind, stored), packing, stored, stream=None) - expected
    assert least < np.linalg.norm(error) / np.linalg.norm(expected) < most


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_other_types_are_decoded_by_the_gguf_package(kind: str) -> None:
    raw, expected = blocks(kind)
    assert packing_that_holds(kind) is None
    values, dtype = decode_block(raw.reshape(-1), len(raw), kind)
    assert dtype == "F32"
    assert np.array_equal(values, expected)


def test_floats_are_themselves() -> None:
    values = np.arange(6, dtype="<f2").reshape(2, 3)
    assert decode_gguf(values.view(np.uint8), "F16").tolist() == values.tolist()
    assert packing_that_holds("F16") is None


def test_the_bits_of_a_type_are_those_of_its_name() -> None:
    assert [packing_that_holds(kind) for kind in HELD] == [Packing(bits=int(kind[1]), group_size=32) for kind in HELD]


def test_without_the_gguf_package_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    really_import = builtins.__import__

    def without_gguf(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return really_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    check_decoder(["Q4_K", "Q8_0", "F32", "BF16"])
    with pytest.raises(
        ConversionError, match=r"type Q6_K are decoded by the package gguf, .* pip install 'qwq-mlx\[gguf"
    ):
        check_decoder(["Q4_K", "Q6_K"])
