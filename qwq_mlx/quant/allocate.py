"""Bits and group for every matrix, so that a model fits a size: a recipe with explicit overrides, from shapes alone.

What is made small is a sum over all matrices of the harm of their packing: the relative squared error of the weights
times a factor of the matrix (the linearity theorem of HIGGS, Malinovskii et al. 2024, arXiv 2411.17525). The factors
were measured, one matrix at a time, on two real models of 0.5 and 1.5 billion parameters, which agree on them within a
third for most kinds (`scripts/measure_sensitivity.py`; docs/benchmarks.md): what a matrix is decides, not how many
weights it has, so that a narrow matrix, k_proj or v_proj, earns more bits than a wide one. The output matrix counts as
much as 1.7 times all down_proj together, the layers of the first eighth half as much as the others and less. The sum of
those harms is the KL of the 0.5B at 3 and at 4 bits within a tenth; at 2 bits a model loses some four times as much
(BEYOND), so nearly all matrices get a third bit before any gets a fourth.

Every matrix begins at the lowest rung of a ladder of packings; then, again and again, the one is raised whose harm
falls most for a byte. Groups of 128 are on the ladder beside the recipe's own: a quarter of a bit is better spent on
more codes. Where two steps are worth the same, the later layer goes first. Nothing is measured, so it costs nothing and
works from headers; the activations of a text do not enter, calibrated or not.

Not measured on the 32B.

Does not: look at weights, or know about files beside the codes (`convert.target_size` does).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qwq_mlx.quant.modes import Packing
from qwq_mlx.quant.recipe import Override, Recipe, layer_of, recipe_of_text

__all__ = [
    "BEYOND",
    "ERRORS",
    "FACTORS",
    "OUTPUT",
    "allocate",
    "free_matrices",
    "harm_factors",
    "ladder",
    "rate",
    "recipe_of_packings",
]

ERRORS = {
    2: {32: 0.0892, 64: 0.1034, 128: 0.1117},
    3: {32: 0.0217, 64: 0.0276, 128: 0.0322},
    4: {32: 0.00509, 64: 0.00681, 128: 0.00843},
    5: {32: 0.00123, 64: 0.00166, 128: 0.00209},
    6: {32: 0.000310, 64: 0.000417, 128: 0.000524},
    8: {32: 0.000023, 64: 0.000030, 128: 0.000036},
}
"""Bits -> group -> relative squared error of normal weights by least squares. Min-max has other errors in nearly the
same proportions, and only these enter."""
BEYOND = {2: 4.0}
"""Bits -> how many times what their error says they cost."""
FACTORS = {
    "q_proj": 0.25,
    "k_proj": 0.5,
    "v_proj": 0.6,
    "o_proj": 0.9,
    "gate_proj": 0.7,
    "up_proj": 1.25,
    "down_proj": 1.0,
}
"""Kind -> how much the relative squared error of such a matrix counts, in the middle of a model."""
FIRST, LAST = 0.4, 1.3
"""The same for the first and the last eighth of the layers, times that."""
OUTPUT, EMBEDDING = 1.7, 0.1
"""The output matrix and the embedding, times the number of layers."""


def ladder(groups: Iterable[int]) -> tuple[Packing, ...]:
    """The packings of these groups that are worth their bits, from the fewest to the most: the convex hull of harm."""
    remaining = [Packing(bits=bits, group_size=group) for bits in ERRORS for group in groups]
    rungs = [min(remaining, key=rate)]
    while more := [each for each in remaining if rate(each) > rate(rungs[-1])]:
        rungs.append(max(more, key=lambda each: _worth(rungs[-1], each)))
    return tuple(rungs)


def rate(packing: Packing) -> float:
    """Bits for a weight, scale and bias of 16 bits each included."""
    return packing.bits + 32 / packing.group_size


def _worth(fewer: Packing, more: Packing) -> float:
    """How much harm falls for a bit of a weight."""
    return (_harm(fewer) - _harm(more)) / (rate(more) - rate(fewer))


def _harm(packing: Packing) -> float:
    return ERRORS[packing.bits][packing.group_size] * BEYOND.get(packing.bits, 1.0)


def free_matrices(recipe: Recipe, matrices: Mapping[str, int], *, n_layers: int) -> dict[str, int]:
    """Those whose bits may be chosen: matrices that no override of the recipe names. matrices: path -> weights."""
    return {
        path: n
        for path, n in matrices.items()
        if not any(override.applies(path, n_layers) for override in recipe.overrides)
    }


def harm_factors(paths: Iterable[str], *, n_layers: int, output: str) -> dict[str, float]:
    """How much a relative squared error of each matrix counts. output: path of the matrix that makes the logits."""
    factors = {}
    for path in paths:
        layer = layer_of(path)
        if layer is None:
            factors[path] = n_layers * (OUTPUT if path == output else EMBEDDING)
        else:
            eighth = 8 * layer // n_layers
            place = FIRST if eighth == 0 else LAST if eighth == 7 else 1.0
            factors[path] = place * FACTORS.get(path.rpartition(".")[2], 1.0)
    return factors


def allocate(
    matrices: Mapping[str, int], rungs: Sequence[Packing], *, n_layers: int, output: str, budget_bits: float
) -> dict[str, Packing]:
    """The packing of each matrix, a rung of the ladder; all together take at most `budget_bits`, if the lowest do.

    matrices: path -> weights. output: path of the matrix that makes the logits.
    """
    factors = harm_factors(matrices, n_layers=n_layers, output=output)
    at = dict.fromkeys(matrices, 0)
    used = sum(rate(rungs[0]) * n for n in matrices.values())

    def step(path: str) -> tuple[float, int, str]:
        """To the next rung, as a heap sorts it: minus its worth, minus its layer, path."""
        layer = layer_of(path)
        worth = factors[path] * _worth(*rungs[at[path] : at[path] + 2]) / matrices[path]
        return -worth, -n_layers if layer is None else -layer, path

    steps = [step(path) for path in matrices]
    heapq.heapify(steps)
    while steps:
        path = heapq.heappop(steps)[2]
        more = (rate(rungs[at[path] + 1]) - rate(rungs[at[path]])) * matrices[path]
        if used + more > budget_bits:
            continue  # a smaller matrix may still fit
        at[path], used = at[path] + 1, used + more
        if at[path] + 1 < len(rungs):
            heapq.heappush(steps, step(path))
    return {path: rungs[place] for path, place in at.items()}


def recipe_of_packings(recipe: Recipe, packings: Mapping[str, Packing], *, name: str, how: str | None = None) -> Recipe:
    """The recipe with its own packing replaced: the most frequent one for all, an override for each other.

    packings: of each free matrix. name: of the new recipe. how: they were chosen, for its first line; None is by size
    from `recipe`. Its text is a whole TOML file, so that it can be repeated.
    """
    paths: dict[Packing, list[str]] = {}
    for path, packing in packings.items():
        paths.setdefault(packing, []).append(path)
    base = max(paths, key=lambda packing: (len(paths[packing]), rate(packing)))
    lines = [f"# {name}: {how or f'chosen by size, from {recipe.name}'}.", "", "[weights]", *_packing_lines(base)]
    lines.append(f"fit = {json.dumps(recipe.fit)}")
    for packing in sorted(paths.keys() - {base}, key=rate, reverse=True):
        lines += _override_lines(Override(match=tuple(paths[packing]), layers="all", packing=None, line=0))
        lines += _packing_lines(packing)
    for override in recipe.overrides:
        lines += _override_lines(override)
        lines += ["keep = true"] if override.packing is None else _packing_lines(override.packing)
    return replace(recipe_of_text("\n".join([*lines, ""]), path=recipe.path), name=name)


def _override_lines(override: Override) -> list[str]:
    listed = [f"    {json.dumps(pattern)}," for pattern in override.match]
    return ["", "[[override]]", "match = [", *listed, "]", f"layers = {json.dumps(override.layers)}"]


def _packing_lines(packing: Packing) -> list[str]:
    return [f'mode = "{packing.mode}"', f"bits = {packing.bits}", f"group_size = {packing.group_size}"]
