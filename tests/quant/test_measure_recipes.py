"""The script behind the table of recipes: what it says of the 32B, and a pocket off the grid that computes the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.model.load import load_model
from qwq_mlx.pocket import FOLDER
from qwq_mlx.quant.recipe import load_recipe, recipe_names


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    path = repository / "scripts" / "measure_recipes.py"
    spec = importlib.util.spec_from_file_location("measure_recipes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
