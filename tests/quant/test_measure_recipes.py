"""The script behind the table of recipes: what it says of the 32B, and a pocket off the grid that computes the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scripts_as_modules import script_module

from qwq_mlx.model.load import load_model
from qwq_mlx.pocket import FOLDER
from qwq_mlx.quant.recipe import load_recipe, recipe_names


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("measure_recipes")


@pytest.mark.parametrize(
    ("name", "gb"), [("4bit", 18.43), ("2bit", 10.24), ("8bit", 34.81), ("4bit-g32", 20.48), ("mxfp4", 17.41)]
)
def test_sizes_of_the_32b_are_weights_times_bits(script: ModuleType, name: str, gb: float) -> None:
    found = script.of_the_32b(load_recipe(name))
    assert found["gb_32b"] == pytest.approx(gb, rel=1e-3)
    smallest = found["smallest_mac_gib"]
    assert smallest in script.MACS_GIB and smallest * 2**30 * 3 / 4 > gb * 1e9


def test_every_recipe_of_the_package_has_its_row(script: ModuleType, tmp_path: Path) -> None:
    names = [name for name, _, _ in script.forms(tmp_path)]
    assert len(names) == len(set(names)) and {"calibrated-2", "min-max-4", "least-squares-3"} <= set(names)
    left_out = set(recipe_names()) - set(names)
    assert {(r.packing.bits, r.packing.group_size) for r in map(load_recipe, left_out)} == {(2, 64), (3, 64), (4, 64)}


def test_the_pocket_off_the_grid_computes_what_the_pocket_does(script: ModuleType, tmp_path: Path) -> None:
    folders = (FOLDER, script.off_grid(tmp_path / "off"))
    ids = mx.array([[5, 260, 17, 99, 1, 42, 300, 7]])
    ours, other = (np.array(load_model(each, compute_type="float32").module(ids)[0]) for each in folders)
    assert np.abs(ours - other).max() < 0.05 * np.abs(ours).max()
    one, two = (
        np.array(
            mx.load(str(next(each.glob("*1-of*.safetensors"))))["model.layers.0.mlp.up_proj.weight"].astype(mx.float32)
        )
        for each in folders
    )
    assert np.abs(one - two).max() > 0.2 * np.abs(one).max()


@pytest.mark.parametrize(("bits", "has_bias"), [(2, False), (3, True), (4, False)])
def test_mlx_lms_packed_layers_multiply_and_learn_as_mlx_has_it(bits: int, has_bias: bool) -> None:
    multiply = script_module("mlx_lm_methods")._multiply_unpacked
    mx.random.seed(bits)
    layer = nn.QuantizedLinear(128, 32, bias=has_bias, group_size=64, bits=bits)
    if has_bias:
        layer.bias = mx.random.normal((32,))
    x = mx.random.normal((5, 128))

    def loss(call: Any, scales: mx.array, biases: mx.array) -> mx.array:
        layer.scales, layer.biases = scales, biases
        return mx.sum(mx.square(call(layer, x)))

    given = layer.scales, layer.biases
    ours, mlx = ([call(layer, x), *mx.grad(loss, (1, 2))(call, *given)] for call in (multiply, type(layer).__call__))
    for one, other in zip(ours, mlx, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-3)


def test_a_method_of_mlx_lm_that_takes_too_long_or_fails_has_a_row_that_says_why(
    script: ModuleType, tmp_path: Path
) -> None:
    texts = {"ids": tmp_path / "none.json", "distilled": tmp_path / "none.json"}
    row, _ = script.by_mlx_lm("AWQ", 2, tmp_path, tmp_path, texts, 0.001)
    assert row == {"name": "mlx-lm AWQ 2", "not_run": "over 0.001 s"}
    row, _ = script.by_mlx_lm("GPTQ", 2, tmp_path, tmp_path, texts, 60)
    assert row["name"] == "mlx-lm GPTQ 2" and "config.json" in row["not_run"]


def test_rows_of_ids_are_whole_and_in_order(script: ModuleType) -> None:
    assert script.in_rows(iter(range(1200))) == [list(range(512)), list(range(512, 1024))]
