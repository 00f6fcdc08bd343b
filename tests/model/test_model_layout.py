"""What each file tensor must look like, once whole and once packed."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest
from test_qwen2_config import parse

from qwq_mlx.errors import LoadError
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.layout import Packing, check_layout, packings
from qwq_mlx.quant.modes import MODES

CONFIG = parse(hidden_size=128, intermediate_size=192, num_attention_heads=4, vocab_size=320, num_hidden_layers=1)
MATRICES = [name.removesuffix(".weight") for name, shape in tensor_shapes(CONFIG).items() if len(shape) == 2]
DOWN = "model.layers.0.mlp.down_proj"
GLOBAL = {"bits": 4, "group_size": 64, "mode": "affine"}

Found = dict[str, tuple[str, tuple[int, ...]]]


def whole(dtype: str = "BF16") -> Found:
    return {name: (dtype, shape) for name, shape in tensor_shapes(CONFIG).items()}


def packed(bits: dict[str, int], group_size: int = 64) -> Found:
    """A conversion's tensors. bits: matrix path -> bits per weight."""
    found = whole()
    for path, n_bits in bits.items():
        rows, columns = tensor_shapes(CONFIG)[f"{path}.weight"]
        found[f"{path}.weight"] = ("U32", (rows, columns * n_bits // 32))
        for name in ("scales", "biases"):
            found[f"{path}.{name}"] = ("BF16", (rows, columns // group_size))
    return found


def check(settings: Any, found: Found) -> dict[str, Packing]:
    config_json = {} if settings is None else {"quantization": settings}
    result = packings(config_json, CONFIG, found, where="m/config.json")
    check_layout(CONFIG, result, found, where="m")
    return result


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_checkpoint_of_floats_has_no_packing(dtype: str) -> None:
    assert check(None, whole(dtype)) == {}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_conversion_of_any_affine_width_passes(bits: int) -> None:
    found = packed(dict.fromkeys(MATRICES, bits))
    assert check({**GLOBAL, "bits": bits}, found) == dict.fromkeys(MATRICES, Packing(bits=bits, group_size=64))


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_a_conversion_of_any_other_mode_has_byte_scales_and_no_biases(mode: str, bits: int, group_size: int) -> None:
    found = packed(dict.fromkeys(MATRICES, bits), group_size)
    for path in MATRICES:
        del found[f"{path}.biases"]
        found[f"{path}.scales"] = ("U8", found[f"{path}.scales"][1])
    settings = {"mode": mode, "bits": bits, "group_size": group_size}
    assert check(settings, found) == dict.fromkeys(MATRICES, Packing(**settings))
    with pytest.raises(LoadError, match=f"{DOWN}.scales BF16, expected U8"):
        check(settings, found | {f"{DOWN}.scales": ("BF16", found[f"{DOWN}.scales"][1])})


def test_entries_by_name_win_over_the_entry_for_all() -> None:
    bits = dict.fromkeys(MATRICES, 4) | {DOWN: 8}
    result = check({**GLOBAL, DOWN: {"bits": 8, "group_size": 64}}, packed(bits))
    assert result[DOWN].bits == 8
    assert {packing.bits for path, packing in result.items() if path != DOWN} == {4}


def test_a_matrix_without_scales_stays_whole_as_mlx_lm_reads_it() -> None:
    bits = {path: 4 for path in MATRICES if path != "lm_head"}
    assert "lm_head" not in check(GLOBAL, packed(bits))
    assert "lm_head" not in check({**GLOBAL, "lm_head": False}, packed(bits))


@pytest.mark.parametrize(
    "settings",
    [
        {**GLOBAL, DOWN: {"bits": 6, "group_size": None, "mode": "affine"}},
        {**GLOBAL, DOWN: {"bits": 6}},
        {"bits": 4, DOWN: {"bits": 6, "mode": None}},
        {"group_size": 64, "mode": None, DOWN: {"group_size": 64, "bits": 6}},
        {**GLOBAL, DOWN: {"bits": 6}, "lm_head": True},
        {**GLOBAL, DOWN: {"bits": 6}, "lm_head": {"group_size": 64}},
    ],
)
def test_what_an_entry_leaves_open_is_mlxs_default(settings: Any) -> None:
    result = check(settings, packed(dict.fromkeys(MATRICES, 4) | {DOWN: 6}))
    assert result == dict.fromkeys(MATRICES, Packing(bits=4, group_size=64)) | {DOWN: Packing(bits=6, group_size=64)}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("settings", [{}, {"bits": None}, {"group_size": None}, {"bits": None, "group_size": None}])
def test_defaults_are_those_of_mlx(mode: str, settings: dict[str, None]) -> None:
    layer = nn.Linear(128, 8).to_quantized(mode=mode)
    expected = Packing(mode=mode, bits=layer.bits, group_size=layer.group_size)
    assert Packing.from_settings({"mode": mode, **settings}) == expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (4, r"m/config\.json: quantization is 4, expected an object"),
        (
            {**GLOBAL, "model.layers.9.mlp.down_proj": GLOBAL},
            "names 'model.layers.9.mlp.down_proj', which is no matrix",
        ),
        ({**GLOBAL, DOWN: 4}, f"quantization of {DOWN} is 4, expected an object, true or false"),
        ({**GLOBAL, "mode": ["affine"]}, r"quantization of all layers: mode is \['affine'\], expected one of affine"),
        ({**GLOBAL, "mode": "gguf"}, "quantization of all layers: mode is 'gguf', expected one of affine, mxfp4"),
        ({**GLOBAL, "mode": "mxfp4"}, "group_size is 64, expected 32 in mode 'mxfp4'. Convert the source again"),
        ({**GLOBAL, "bits": 7}, "quantization of all layers: bits is 7, expected 2, 3, 4, 5, 6, 8 in mode 'affine'"),
        ({**GLOBAL, DOWN: {"bits": "4", "group_size": 64}}, f"quantization of {DOWN}: bits is '4', expected 2, 3"),
        ({**GLOBAL, "group_size": 16}, "group_size is 16, expected 32, 64, 128 in mode 'affine'"),
    ],
)
def test_settings_that_mlx_does_not_have_are_refused(settings: Any, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        check(settings, packed(dict.fromkeys(MATRICES, 4)))


@pytest.mark.parametrize(
    ("settings", "found", "text"),
    [
        (None, packed(dict.fromkeys(MATRICES, 4)), "18 unknown: lm_head.biases, lm_head.scales"),
        (GLOBAL, packed(dict.fromkeys(MATRICES, 8)), r"lm_head.weight \(320, 32\), expected \(320, 16\)"),
        ({**GLOBAL, "lm_head": False}, packed(dict.fromkeys(MATRICES, 4)), "2 unknown: lm_head.biases, lm_head.scales"),
        ({**GLOBAL, "group_size": 128}, packed({DOWN: 4}), f"{DOWN}.weight has 192 columns, which groups of 128 at 4"),
        (GLOBAL, packed({DOWN: 4}) | {f"{DOWN}.weight": ("F32", (128, 24))}, f"{DOWN}.weight F32, expected U32"),
        (None, whole() | {"lm_head.weight": ("I8", (320, 128))}, "lm_head.weight I8, expected BF16 or F16 or F32"),
        (None, whole("F64"), r"15 of another type: .*"),
    ],
)
def test_tensors_that_the_settings_do_not_describe_are_named(settings: Any, found: Found, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        check(settings, found)
