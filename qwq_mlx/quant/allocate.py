"""Bits for every matrix, so that a model fits a size: a recipe with explicit overrides, from shapes alone.

What is made small is a sum over all matrices of the harm of their bits. From 4 bits on harm is the relative squared
error of the weights, a fourth for each bit more. Below, the loss of a model grows faster than that: on the pocket
model's KL 3 bits everywhere cost 6 times and 2 bits 130 times what 4 do, where the errors are 4 and 15 times as large.
So nearly all get a third bit before any gets a fourth. To first order the loss is a sum of relative errors with a
factor for each matrix that its size does not enter (the linearity theorem of HIGGS, Malinovskii et al. 2024, arXiv
2411.17525), so that a narrow matrix, k_proj or v_proj, earns more bits than a wide one; here a matrix of n weights
counts sqrt(n), half-way to counting every weight alike. The output matrix counts OUTPUT times besides, for its errors
reach the logits undiluted; v_proj and down_proj of the layers that a recipe calls "sensitive" count SENSITIVE times, as
mlx-lm's mixed recipes and llama.cpp's K mixes give these more.

Every matrix begins with 2 bits; then, again and again, the one gets its next width (3, 4, 5, 6, 8) whose harm falls
most for a byte. Where two steps are worth the same, the sensitive layers and the later ones go first. Nothing is
measured, so it costs nothing and works from headers; the activations of a text do not enter, --calibrate or not.

KL of the pocket model off its training grid, beside recipes of the same bytes, means of four texts that nothing was
chosen on (5,259 tokens, scripts/pocket/target_size.py --first-seed 51): 0.00072 where 2bit-g32 has 0.0061, 0.00034
(mixed_2_6: 0.0047), 0.00020 (3bit: 0.00034), 0.000063 (mixed_3_4: 0.00014), 0.00018 (mixed_3_6: 0.00032). From 4 to 5
bits per weight it is a draw: 0.000074 (4bit: 0.000065), and one token of one text makes it 0.00039 at the bytes of
4bit-g128 (0.000036). Above, 0.000031 (5bit: 0.000083) and 0.0000018 (6bit: 0.0000024). Not measured on the 32B.

Does not: look at weights, or know about files beside the codes (`convert.target` does).
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import replace

from qwq_mlx.quant.modes import MODES, Packing
from qwq_mlx.quant.recipe import Override, Recipe, is_sensitive_layer, layer_of, recipe_of_text

__all__ = ["HARM", "OUTPUT", "SENSITIVE", "allocate_bits", "free_matrices", "recipe_of_bits"]

HARM = {2: 132.0, 3: 6.0, 4: 1.0, 5: 0.244, 6: 0.061, 8: 0.0044}
"""Bits -> what they cost, 4 bits as 1, for groups of 64 by least squares. Other groups and min-max cost other amounts
in nearly the same proportions, and only these enter."""
OUTPUT = 64.0
"""How many times the harm of the output matrix counts."""
SENSITIVE = 4.0
"""How many times the harm of v_proj and down_proj of a sensitive layer counts."""

_BITS = MODES["affine"][0]
_KINDS = ("lm_head", "down_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "embed_tokens")


def free_matrices(recipe: Recipe, matrices: Mapping[str, int], *, n_layers: int) -> dict[str, int]:
    """Those whose bits may be chosen: matrices that no override of the recipe names. matrices: path -> weights."""
    return {
        path: n
        for path, n in matrices.items()
        if not any(override.applies(path, n_layers) for override in recipe.overrides)
    }


def allocate_bits(matrices: Mapping[str, int], *, n_layers: int, output: str, budget_bits: int) -> dict[str, int]:
    """Bits of each matrix, at least 2; the codes of all together take at most `budget_bits`, if 2 bits each do.

    matrices: path -> weights. output: path of the matrix that makes the logits.
    """
    bits = dict.fromkeys(matrices, _BITS[0])
    used = sum(_BITS[0] * n for n in matrices.values())
    steps = [_step(path, _BITS[0], n, n_layers, output) for path, n in matrices.items()]
    heapq.heapify(steps)
    while steps:
        _, _, path, wider = heapq.heappop(steps)
        more = (wider - bits[path]) * matrices[path]
        if used + more > budget_bits:
            continue  # a smaller matrix may still fit
        bits[path], used = wider, used + more
        if wider != _BITS[-1]:
            heapq.heappush(steps, _step(path, wider, matrices[path], n_layers, output))
    return bits


def _step(path: str, bits: int, n: int, n_layers: int, output: str) -> tuple[float, tuple[bool, int, int], str, int]:
    """From `bits` to the next width, as a heap sorts it: minus its worth, its rank among equals, path, the width."""
    wider = _BITS[_BITS.index(bits) + 1]
    kind, layer = path.rpartition(".")[2], layer_of(path)
    is_in_sensitive = layer is not None and is_sensitive_layer(layer, n_layers)
    counts = OUTPUT if path == output else SENSITIVE if is_in_sensitive and kind in ("v_proj", "down_proj") else 1.0
    worth = counts * (HARM[bits] - HARM[wider]) / ((wider - bits) * math.sqrt(n))  # sqrt(n) times, for n weights
    rank = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    return -worth, (not is_in_sensitive, rank, -n_layers if layer is None else -layer), path, wider


def recipe_of_bits(recipe: Recipe, bits: Mapping[str, int], *, name: str) -> Recipe:
    """The recipe with its own bits replaced: the most frequent width for all, an override for each other width.

    bits: of each free matrix. name: of the new recipe. Its text is a whole TOML file, so that it can be repeated.
    """
    paths: dict[int, list[str]] = {}
    for path, width in bits.items():
        paths.setdefault(width, []).append(path)
    base = max(paths, key=lambda width: (len(paths[width]), width))
    own, packing = recipe.packing, replace(recipe.packing, bits=base)
    lines = [f"# {name}: bits chosen by size, from {recipe.name}.", "", "[weights]", *_packing_lines(packing)]
    lines.append(f"fit = {json.dumps(recipe.fit)}")
    for width in sorted(paths.keys() - {base}, reverse=True):
        lines += _override_lines(Override(match=tuple(paths[width]), layers="all", packing=None, line=0))
        lines += _packing_lines(replace(own, bits=width))
    for override in recipe.overrides:
        lines += _override_lines(override)
        lines += ["keep = true"] if override.packing is None else _packing_lines(override.packing)
    return replace(recipe_of_text("\n".join([*lines, ""]), path=recipe.path), name=name)


def _override_lines(override: Override) -> list[str]:
    listed = [f"    {json.dumps(pattern)}," for pattern in override.match]
    return ["", "[[override]]", "match = [", *listed, "]", f"layers = {json.dumps(override.layers)}"]


def _packing_lines(packing: Packing) -> list[str]:
    return [f'mode = "{packing.mode}"', f"bits = {packing.bits}", f"group_size = {packing.group_size}"]
