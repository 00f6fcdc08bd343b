"""Recipe files: what they say is what is packed, and what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qwq_mlx.errors import RecipeError
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import DEFAULT_RECIPE, layer_of, load_recipe, recipe_names


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_recipe_packs_every_matrix_in_4_bits_of_groups_of_64() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)
    assert recipe.packing == Packing(mode="affine", bits=4, group_size=64)
    assert recipe.fit == "least-squares" and recipe.overrides == () and recipe.name == DEFAULT_RECIPE


def test_recipes_of_the_package_are_the_files_of_conversions_and_all_load(repository: Path) -> None:
    assert recipe_names() == sorted(path.stem for path in (repository / "conversions").glob("*.toml"))
    for name in recipe_names():
        assert load_recipe(name).text == (repository / "conversions" / f"{name}.toml").read_text(encoding="utf-8")


def test_a_later_override_wins_and_keep_leaves_a_matrix(tmp_path: Path) -> None:
    text = """
[weights]
bits = 3
[[override]]
match = "*_proj"
group_size = 32
[[override]]
match = ["*.v_proj", "lm_head"]
bits = 6
[[override]]
match = "model.layers.1.self_attn.v_proj"
keep = true
"""
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.packing_of("model.embed_tokens", n_layers=8) == Packing(bits=3)
    assert recipe.packing_of("model.layers.0.mlp.up_proj", n_layers=8) == Packing(bits=3, group_size=32)
    assert recipe.packing_of("model.layers.0.self_attn.v_proj", n_layers=8) == Packing(bits=6)
    assert recipe.packing_of("model.layers.1.self_attn.v_proj", n_layers=8) is None
    assert recipe.packing_of("lm_head", n_layers=8) == Packing(bits=6)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.63.self_attn.q_proj.weight", 63),
        ("layers.7.keys", 7),
        ("model.embed_tokens.weight", None),
        ("lm_head", None),
        ("model.players.3.weight", None),
        ("model.layers.norm.weight", None),
    ],
)
def test_a_name_says_its_layer(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("n_layers", [2, 8, 17, 64])
def test_sensitive_layers_are_those_of_mlx_lms_mixed_recipes(tmp_path: Path, n_layers: int) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder

    paths = [f"model.layers.{i}.{name}" for i in range(n_layers) for name in ("self_attn.v_proj", "mlp.down_proj")]
    model = SimpleNamespace(named_modules=lambda: [(path, None) for path in paths], layers=range(n_layers))
    theirs = mixed_quant_predicate_builder("mixed_3_6", model)
    text = '[weights]\nbits = 3\n[[override]]\nmatch = ["*.v_proj", "*.down_proj"]\nlayers = "sensitive"\nbits = 6\n'
    recipe = load_recipe(write(tmp_path, text + '[[override]]\nmatch = "lm_head"\nbits = 6\n'))
    for path in [*paths, "lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"]:
        ours = recipe.packing_of(path, n_layers=n_layers)
        assert ours is not None
        assert {"group_size": ours.group_size, "bits": ours.bits, "mode": ours.mode} == theirs(path, None)


W = "[weights]\nbits = 4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[weights\nbits = 4", r"own\.toml: not TOML: .*line 1"),
        ("", r"own\.toml: there is no \[weights\] table"),
        ("weights = 4", r"there is no \[weights\] table"),
        (
            "# one\ncolour = 1\n[weights]\n",
            r"own\.toml, line 2: unknown key 'colour', expected one of weights, override",
        ),
        ("[weights]\nbits = 4\n[wieghts]\n", r"line 3: unknown key 'wieghts'"),
        ("[weights]\n# x\nbit = 4\n", r"line 3: unknown key 'bit', expected one of mode, bits, group_size, fit"),
        ("[weights]\n\nbits = 7\n", r"line 3: bits is 7, expected 2, 3, 4, 5, 6, 8"),
        ('[weights]\nmode = "q4_k"\n', r"line 2: mode is 'q4_k'"),
        ("[weights]\nbits = 4\ngroup_size = 48\n", r"line 3: group_size is 48"),
        ('[weights]\nfit = "magic"\n', r"line 2: fit is 'magic', expected one of min-max"),
        (
            '[weights]\nmode = "mxfp4"\ngroup_size = 32\nfit = "least-squares"\n',
            r"line 2: mode 'mxfp4' has only the fit 'min-max', this recipe's fit is 'least-squares'\. Give",
        ),
        (
            W + 'fit = "calibrated"\n[[override]]\nmatch = "*"\nmode = "mxfp8"\nbits = 8\ngroup_size = 32\n',
            r"line 6: mode 'mxfp8' has only the fit 'min-max', this recipe's fit is 'calibrated'",
        ),
        (W + '[override]\nmatch = "*"\nbits = 3\n', r"line 3: override is one table, expected a list of them: \[\[ov"),
        (W + "[[override]]\nbits = 3\n", r"line 3: match is None, expected a pattern"),
        (W + "[[override]]\nmatch = []\nbits = 3\n", r"line 4: match is \[\], expected a pattern"),
        (
            W + '[[override]]\nmatch = "*"\nlayers = "odd"\nbits = 3\n',
            r"line 5: layers is 'odd', expected one of all, sen",
        ),
        (W + '[[override]]\nmatch = "*"\nkeep = 1\n', r"line 5: keep is 1, expected true or false"),
        (W + '[[override]]\nmatch = "*"\nkeep = true\nbits = 3\n', r"line 4: keep = true stands beside a packing"),
        (W + '[[override]]\nmatch = "*"\n', r"line 4: it changes nothing: give either keep = true or one of mode"),
        (W + '[[override]]\nmatch = "*"\nbits = 3\n[[override]]\nmatch = "a"\nbits = 9\n', r"line 8: bits is 9"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_pattern_that_fits_nothing_is_refused_with_its_line(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, W + '[[override]]\nmatch = "*.w_proj"\nbits = 8\n'))
    with pytest.raises(
        RecipeError, match=r"line 4: match \['\*\.w_proj'\] .* fits no matrix.*end in: lm_head, up_proj\."
    ):
        recipe.check_matches(["lm_head", "model.layers.0.mlp.up_proj"], n_layers=1)
    recipe.check_matches(["model.layers.0.mlp.w_proj"], n_layers=1)


def test_an_unknown_name_lists_the_recipes_there_are() -> None:
    with pytest.raises(RecipeError, match=r"no recipe '7bit'. Recipes: .*qwq-32b-preview-4bit.* ends in \.toml"):
        load_recipe("7bit")
    with pytest.raises(RecipeError, match=r"no recipe '\.\./conversions/pocket-4bit'"):
        load_recipe("../conversions/pocket-4bit")


def test_a_recipe_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: there is no such file. Give a recipe"):
        load_recipe(tmp_path / "none.toml")
    path = tmp_path / "own.toml"
    path.write_bytes(b"# \xff")
    with pytest.raises(RecipeError, match=r"own\.toml: is not UTF-8 \(byte 2\)"):
        load_recipe(path)
    path.write_text("[weights]\nbits = " + "9" * 5000)
    with pytest.raises(RecipeError, match=r"own\.toml: not TOML: Exceeds the limit \(4300 digits\)"):
        load_recipe(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match=r"own\.toml: has 2,097,152 bytes, expected at most 1,048,576"):
        load_recipe(path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path.write_text(W)
    monkeypatch.setattr("qwq_mlx.files.reading.open_to_read", refuse)
    with pytest.raises(RecipeError, match=r"own\.toml: cannot be opened \(Permission denied\)"):
        load_recipe(path)
