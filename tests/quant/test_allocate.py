"""Bits by size: the budget holds, more goes where it is worth more, and the recipe that results says it all."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from qwq_mlx import facts
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.memory import shape_of_facts
from qwq_mlx.quant.allocate import HARM, OUTPUT, SENSITIVE, allocate_bits, free_matrices, recipe_of_bits
from qwq_mlx.quant.fit import Scratch, fit_block
from qwq_mlx.quant.packing import Packing, round_to
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
            return OUTPUT
        kind, layer = path.rpartition(".")[2], path.split(".")[2] if "layers" in path else "-1"
        return SENSITIVE if kind in ("v_proj", "down_proj") and int(layer) in sensitive else 1

    return sum(counts(path) * MATRICES[path] ** 0.5 * HARM[b] for path, b in bits.items())


def test_harm_is_the_error_of_normal_weights_from_4_bits_on_and_more_below() -> None:
    raw = round_to(np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32), "BF16")
    errors = {
        bits: fit_block(raw, "BF16", Packing(bits=bits), fit="least-squares", scratch=Scratch())[1].error2
        for bits in HARM
    }
    for bits, harm in HARM.items():
        error = errors[bits] / errors[4]
        assert harm > 1.4 * error if bits < 4 else harm == pytest.approx(error, rel=0.05)
    widths = list(HARM)
    falls = [(HARM[a] - HARM[b]) / (b - a) for a, b in itertools.pairwise(widths)]
    assert falls == sorted(falls, reverse=True)  # or a step could be worth more than the one before it, and never come


@pytest.mark.parametrize("target", [2.0, 2.7, 3.0, 3.5, 4.0, 4.5, 5.3, 6.0, 7.9, 8.0])
def test_the_budget_is_kept_and_no_step_more_would_fit_it(target: float) -> None:
    bits, next_width = allocated(target), {2: 3, 3: 4, 4: 5, 5: 6, 6: 8}
    used = sum(MATRICES[path] * b for path, b in bits.items())
    assert used <= target * TOTAL
    assert all(used + (next_width[b] - b) * MATRICES[path] > target * TOTAL for path, b in bits.items() if b < 8)
    assert set(bits.values()) <= {2, 3, 4, 5, 6, 8}


@pytest.mark.parametrize(("width", "most"), [(3, 1.0), (4, 0.9), (5, 0.9), (6, 0.9)])
def test_at_the_bytes_of_a_uniform_recipe_the_harm_is_lower(width: int, most: float) -> None:
    """Not at 3 bits: with so little difference in size nothing is worth the 2 bits that it would cost elsewhere."""
    assert loss(allocated(width)) <= most * loss(dict.fromkeys(MATRICES, width))


def test_a_narrow_matrix_gets_more_bits_than_a_wide_one() -> None:
    for target in (2.3, 4.3):
        bits = allocated(target)
        assert bits["model.layers.6.self_attn.v_proj"] > bits["model.layers.6.mlp.down_proj"]  # no sensitive layer


def test_of_equal_matrices_all_have_a_third_bit_before_any_has_a_fourth() -> None:
    gates = [[b for path, b in allocated(target).items() if "gate_proj" in path] for target in (2.2, 2.9, 3.3, 3.6)]
    assert [set(each) for each in gates] == [{2}, {2, 3}, {3}, {3, 4}]


def test_no_exchange_of_two_steps_would_lower_the_harm() -> None:
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
        assert now["lm_head"] > now["model.embed_tokens"] or target == 3.0
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


def of_the_32b(bits: float) -> dict[str, int]:
    shape = shape_of_facts(facts.QWQ_32B_PREVIEW)
    sizes = tensor_shapes(shape.config)
    matrices = {path: math.prod(sizes[f"{path}.weight"]) for path in shape.packed}
    return allocate_bits(matrices, n_layers=64, output="lm_head", budget_bits=int(bits * sum(matrices.values())))


def test_the_32b_gets_its_third_bit_in_attention_and_head_first() -> None:
    low, three, four = (of_the_32b(bits) for bits in (2.5, 3.0, 4.0))
    assert min(b for path, b in low.items() if "self_attn" in path) == 3 and low["model.layers.1.mlp.gate_proj"] == 2
    assert three.pop("model.embed_tokens") == 2 and three.pop("lm_head") == 4 and set(three.values()) == {3}
    assert set(four.values()) == {3, 4, 5} and four["model.layers.1.mlp.down_proj"] == 4
    assert four["lm_head"] == four["model.layers.0.self_attn.v_proj"] == 5
