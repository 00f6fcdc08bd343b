"""Bits by size: the budget holds, more goes where it is worth more, and the recipe that results says it all."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwq_mlx import facts
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.memory.plan import shape_of_facts
from qwq_mlx.quant.allocate import (
    BEYOND,
    ERRORS,
    allocate,
    free_matrices,
    harm_factors,
    ladder,
    rate,
    recipe_of_packings,
)
from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.packing import Packing, round_to
from qwq_mlx.quant.recipe import load_recipe, recipe_of_mapping, recipe_of_text

N_LAYERS = 16
KINDS = {"self_attn.q_proj": 40, "self_attn.v_proj": 10, "mlp.gate_proj": 70, "mlp.down_proj": 70}
MATRICES = {f"model.layers.{i}.{kind}": n for i in range(N_LAYERS) for kind, n in KINDS.items()}
MATRICES |= {"model.embed_tokens": 300, "lm_head": 300}
TOTAL = sum(MATRICES.values())


BOTH, PLAIN = ladder((64, 128)), ladder((64,))


def packed(bits: float, rungs: tuple[Packing, ...] = PLAIN, output: str = "lm_head") -> dict[str, Packing]:
    """As many bits for a weight, scales and biases included."""
    return allocate(MATRICES, rungs, n_layers=N_LAYERS, output=output, budget_bits=bits * TOTAL)


def allocated(bits: float, output: str = "lm_head") -> dict[str, int]:
    """Bits of codes alone, all groups of 64."""
    return {path: packing.bits for path, packing in packed(bits + 0.5, output=output).items()}


def harm(packing: Packing) -> float:
    return ERRORS[packing.bits][packing.group_size] * BEYOND.get(packing.bits, 1.0)


def loss(packings: dict[str, Packing]) -> float:
    """What the allocation makes small, written down once more."""

    def counts(path: str) -> float:
        if "layers" not in path:
            return (1.7 if path == "lm_head" else 0.1) * N_LAYERS
        kind, layer = path.rpartition(".")[2], int(path.split(".")[2])
        of_kind = {"q_proj": 0.25, "v_proj": 0.6, "gate_proj": 0.7, "down_proj": 1.0}[kind]
        return of_kind * {0: 0.4, 1: 0.4, 14: 1.3, 15: 1.3}.get(layer, 1.0)

    return sum(counts(path) * harm(packing) for path, packing in packings.items())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", ERRORS)
def test_errors_are_those_of_normal_weights(bits: int, group: int) -> None:
    raw = round_to(np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32), "BF16")
    packing = Packing(bits=bits, group_size=group)
    error = fit_block(raw, "BF16", packing, fit="least-squares")[1]
    assert error.error2 / error.weight2 == pytest.approx(ERRORS[bits][group], rel=0.03)


@pytest.mark.parametrize("model", ["0.5b", "1.5b"])
def test_factors_are_those_of_real_models(model: str, repository: Path) -> None:
    lines = (repository / "benchmarks" / f"2026-11-28-sensitivity-{model}.jsonl").read_text().splitlines()
    measured = {row["path"]: row["factor"] for row in map(json.loads, lines)}
    n_layers = 1 + max(int(path.split(".")[2]) for path in measured if ".layers." in path)
    factors = harm_factors(measured, n_layers=n_layers, output="lm_head")
    unit = np.mean([measured[path] / factor for path, factor in factors.items() if path.endswith("down_proj")])
    kinds = {path.rpartition(".")[2] for path in measured} - {"embed_tokens"}
    for kind in kinds:
        ratio = [measured[path] / (unit * factors[path]) for path in measured if path.endswith(kind)]
        assert 0.6 < np.mean(ratio) < 1.5, kind
    logs = np.log([measured[path] for path in measured]), np.log([factors[path] for path in measured])
    assert np.corrcoef(*logs)[0, 1] > 0.75


@pytest.mark.parametrize("groups", [(64,), (128,), (64, 128), (32, 64, 128)])
def test_a_ladder_is_the_lower_hull_of_harm(groups: tuple[int, ...]) -> None:
    rungs = ladder(groups)
    rates = [rate(rung) for rung in rungs]
    every = [Packing(bits=bits, group_size=group) for bits in ERRORS for group in groups]
    assert rates[0] == min(map(rate, every)) and rates[-1] == max(map(rate, every)) and rates == sorted(set(rates))
    for each in every:
        assert harm(each) >= np.interp(rate(each), rates, [harm(rung) for rung in rungs]) * (1 - 1e-9)
    falls = [(harm(a) - harm(b)) / (rate(b) - rate(a)) for a, b in itertools.pairwise(rungs)]
    assert falls == sorted(falls, reverse=True)  # or a step could be worth more than the one before it, and never come


@pytest.mark.parametrize("rungs", [PLAIN, BOTH], ids=["64", "64-and-128"])
@pytest.mark.parametrize("target", [2.5, 2.7, 3.0, 3.5, 4.0, 4.5, 5.3, 6.0, 7.9, 8.5])
def test_the_budget_is_kept_and_no_step_more_would_fit_it(target: float, rungs: tuple[Packing, ...]) -> None:
    found = packed(target, rungs)
    used = sum(MATRICES[path] * rate(packing) for path, packing in found.items())
    assert used <= target * TOTAL and set(found.values()) <= set(rungs)
    for path, packing in found.items():
        if packing != rungs[-1]:
            following = rungs[rungs.index(packing) + 1]
            assert used + (rate(following) - rate(packing)) * MATRICES[path] > target * TOTAL


@pytest.mark.parametrize(("width", "most"), [(3, 1.0), (4, 0.9), (5, 0.9), (6, 0.9)])
def test_at_the_bytes_of_a_uniform_recipe_the_harm_is_lower(width: int, most: float) -> None:
    """Not at 3 bits: with so little difference in size nothing is worth the 2 bits that it would cost elsewhere."""
    uniform = loss(dict.fromkeys(MATRICES, Packing(bits=width)))
    assert loss(packed(width + 0.5)) <= most * uniform
    assert loss(packed(width + 0.5, BOTH)) <= min(loss(packed(width + 0.5)), most * uniform)


def test_a_narrow_matrix_gets_more_bits_than_a_wide_one() -> None:
    for target in (2.3, 4.3):
        bits = allocated(target)
        assert bits["model.layers.6.self_attn.v_proj"] > bits["model.layers.6.mlp.down_proj"]  # no sensitive layer


def test_of_equal_matrices_all_have_a_third_bit_before_any_has_a_fourth() -> None:
    gates = [[b for path, b in allocated(target).items() if "gate_proj" in path] for target in (2.2, 2.9, 3.3, 3.6)]
    assert [set(each) for each in gates] == [{2}, {2, 3}, {3}, {3, 4}]


@pytest.mark.parametrize("rungs", [PLAIN, BOTH], ids=["64", "64-and-128"])
def test_no_exchange_of_two_steps_would_lower_the_harm(rungs: tuple[Packing, ...]) -> None:
    """Greedy by worth for a bit is the optimum where steps are alike in size; here those between equal matrices are."""
    found = packed(4.5, rungs)
    same = [path for path in found if MATRICES[path] == 70]
    for up, down in itertools.permutations(same, 2):
        a, b = rungs.index(found[up]), rungs.index(found[down])
        if a + 1 < len(rungs) and b > 0 and rate(rungs[a + 1]) - rate(rungs[a]) == rate(rungs[b]) - rate(rungs[b - 1]):
            assert loss({**found, up: rungs[a + 1], down: rungs[b - 1]}) >= loss(found) * (1 - 1e-12)


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
    given = dict.fromkeys(free, Packing(bits=3)) | {"lm_head": Packing(bits=6, group_size=128)}
    chosen = recipe_of_packings(recipe, given, name="own-1GB")
    wanted = {**given, "model.layers.0.self_attn.v_proj": Packing(bits=8)}
    for path, packing in {**wanted, "model.embed_tokens": None}.items():
        assert chosen.packing_of(path, n_layers=N_LAYERS) == packing
    assert (chosen.name, chosen.fit) == ("own-1GB", "least-squares")


def test_the_recipe_is_a_file_that_repeats_it_and_so_is_what_the_manifest_keeps() -> None:
    found = packed(4.4, BOTH)
    assert len({(packing.bits, packing.group_size) for packing in found.values()}) > 2
    chosen = recipe_of_packings(load_recipe("4bit-g32"), found, name="4bit-g32-1GB")
    for again in (
        recipe_of_text(chosen.text, path=Path("saved.toml")),
        recipe_of_mapping(chosen.as_mapping(), where=Path("manifest.json")),
    ):
        assert {path: again.packing_of(path, n_layers=N_LAYERS) for path in found} == found


def of_the_32b(bits: float) -> dict[str, int]:
    shape = shape_of_facts(facts.QWQ_32B_PREVIEW)
    sizes = tensor_shapes(shape.config)
    matrices = {path: math.prod(sizes[f"{path}.weight"]) for path in shape.packed}
    budget = (bits + 0.25) * sum(matrices.values())
    found = allocate(matrices, BOTH, n_layers=64, output="lm_head", budget_bits=budget)
    return {path: packing.bits for path, packing in found.items()}


def test_the_32b_gets_its_third_bit_in_attention_and_head_first() -> None:
    low, three, four = (of_the_32b(bits) for bits in (2.5, 3.0, 4.0))
    third = Counter(path.rpartition(".")[2] for path, b in low.items() if b > 2)
    assert third["o_proj"] == third["k_proj"] == 64 and third["gate_proj"] == 0 and low["lm_head"] == 4
    assert three["model.embed_tokens"] == 3 and Counter(three.values())[3] > 250
    assert Counter(b for path, b in four.items() if "mlp" in path)[4] > 0.8 * 3 * 64 and four["lm_head"] == 6
    assert four["model.layers.9.self_attn.v_proj"] == 6 and four["model.layers.0.self_attn.v_proj"] == 5
