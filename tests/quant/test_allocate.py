"""Bits by size: the budget holds, more goes where it is worth more, and the recipe that results says it all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qwq_mlx import facts
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.memory import shape_of_facts
from qwq_mlx.quant.allocate import SENSITIVE, allocate_bits, free_matrices, recipe_of_bits
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import load_recipe, recipe_of_mapping, recipe_of_text

N_LAYERS = 16
KINDS = {"self_attn.q_proj": 40, "self_attn.v_proj": 10, "mlp.gate_proj": 70, "mlp.down_proj": 70}
MATRICES = {f"model.layers.{i}.{kind}": n for i in range(N_LAYERS) for kind, n in KINDS.items()}
MATRICES |= {"model.embed_tokens": 300, "lm_head": 300}
TOTAL = sum(MATRICES.values())


def allocated(bits: float, **changed: object) -> dict[str, int]:
    given = {"n_layers": N_LAYERS, "output": "lm_head", "budget_bits": int(bits * TOTAL), **changed}
    return allocate_bits(MATRICES, **given)


def loss(bits: dict[str, int]) -> float:
    """What the allocation makes small, written down once more."""
    sensitive = {0, 1, 4, 7, 10, 13, 14, 15}  # of 16: the first and last eighth, every third between

    def counts(path: str) -> float:
        if path == "lm_head":
            return SENSITIVE
        kind, layer = path.rpartition(".")[2], path.split(".")[2] if "layers" in path else "-1"
        return SENSITIVE if kind in ("v_proj", "down_proj") and int(layer) in sensitive else 1

    return sum(counts(path) * MATRICES[path] / (2**b - 1) ** 2 for path, b in bits.items())


@pytest.mark.parametrize("target", [2.0, 2.7, 3.0, 3.5, 4.0, 4.5, 5.3, 6.0, 7.9, 8.0])
def test_the_budget_is_kept_and_no_step_more_would_fit_it(target: float) -> None:
    bits, next_width = allocated(target), {2: 3, 3: 4, 4: 5, 5: 6, 6: 8}
    used = sum(MATRICES[path] * b for path, b in bits.items())
    assert used <= target * TOTAL
    assert all(used + (next_width[b] - b) * MATRICES[path] > target * TOTAL for path, b in bits.items() if b < 8)
    assert set(bits.values()) <= {2, 3, 4, 5, 6, 8}


@pytest.mark.parametrize("width", [3, 4, 5, 6])
def test_at_the_bytes_of_a_uniform_recipe_the_weighted_error_is_lower(width: int) -> None:
    assert loss(allocated(width)) < 0.9 * loss(dict.fromkeys(MATRICES, width))


def test_no_exchange_of_two_steps_would_lower_the_weighted_error() -> None:
    """Greedy by worth for a bit is the optimum where steps are alike in size; here those between equal matrices are."""
    bits = allocated(4.0)
    widths = (2, 3, 4, 5, 6, 8)
    same = [path for path in bits if MATRICES[path] == 70]
    for up, down in itertools.permutations(same, 2):
        a, b = widths.index(bits[up]), widths.index(bits[down])
        if a + 1 < len(widths) and b > 0 and widths[a + 1] - widths[a] == widths[b] - widths[b - 1]:
            assert loss({**bits, up: widths[a + 1], down: widths[b - 1]}) >= loss(bits) * (1 - 1e-12)


def test_more_bytes_never_take_bits_from_the_sensitive_matrices() -> None:
    before = allocated(2.5)
    for target in (3.0, 3.5, 4.0, 5.0):
        now = allocated(target)
        assert now["lm_head"] >= before["lm_head"] >= now["model.embed_tokens"] - 1
        assert now["lm_head"] > now["model.embed_tokens"]
        before = now
    tied = allocated(4.0, output="model.embed_tokens")
    assert tied["model.embed_tokens"] > tied["lm_head"]


def test_an_override_of_the_recipe_keeps_its_matrices() -> None:
    recipe = recipe_of_text(
        '[weights]\nfit = "least-squares"\n[[override]]\nmatch = "*.v_proj"\nlayers = "sensitive"\nbits = 8\n'
        '[[override]]\nmatch = "model.embed_tokens"\nkeep = true\n',
        path=Path("own.toml"),
    )
    free = free_matrices(recipe, MATRICES, n_layers=N_LAYERS)
    assert "model.embed_tokens" not in free and "model.layers.0.self_attn.v_proj" not in free
    assert "model.layers.2.self_attn.v_proj" in free
    chosen = recipe_of_bits(recipe, dict.fromkeys(free, 3) | {"lm_head": 6}, name="own-1GB")
    wanted = {path: Packing(bits=3) for path in free}
    wanted |= {"lm_head": Packing(bits=6), "model.layers.0.self_attn.v_proj": Packing(bits=8)}
    for path, packing in {**wanted, "model.embed_tokens": None}.items():
        assert chosen.packing_of(path, n_layers=N_LAYERS) == packing
    assert (chosen.name, chosen.fit) == ("own-1GB", "least-squares")


def test_the_recipe_is_a_file_that_repeats_it_and_so_is_what_the_manifest_keeps() -> None:
    bits = allocated(3.7)
    chosen = recipe_of_bits(load_recipe("4bit-g32"), bits, name="4bit-g32-1GB")
    for again in (
        recipe_of_text(chosen.text, path=Path("saved.toml")),
        recipe_of_mapping(chosen.as_mapping(), where=Path("manifest.json")),
    ):
        for path, b in bits.items():
            assert again.packing_of(path, n_layers=N_LAYERS) == Packing(bits=b, group_size=32)


def test_the_32b_at_the_size_of_4_bits_gives_its_head_and_down_projections_more() -> None:
    shape = shape_of_facts(facts.QWQ_32B_PREVIEW)
    sizes = {f"{n}.weight": s for n in shape.packed for s in [tensor_shapes(shape.config)[f"{n}.weight"]]}
    matrices = {name.removesuffix(".weight"): rows * columns for name, (rows, columns) in sizes.items()}
    bits = allocate_bits(matrices, n_layers=64, output="lm_head", budget_bits=4 * sum(matrices.values()))
    assert (bits["lm_head"], bits["model.layers.63.mlp.down_proj"], bits["model.layers.0.mlp.down_proj"]) == (5, 5, 5)
    assert {bits[path] for path in bits} == {3, 4, 5} and min(bits[p] for p in bits if "v_proj" in p) >= 4
