"""Bits for every matrix, so that a model fits a size: a recipe with explicit overrides, from shapes alone.

Every matrix begins with 2 bits. Then, again and again, the matrix gets its next width (3, 4, 5, 6, 8) whose weighted
error falls most for a bit: the squared error of b bits is taken as 1 / (2**b - 1)**2 of the group's range for all
matrices alike, and counts SENSITIVE times for the output matrix and for v_proj and down_proj of the layers that a
recipe calls "sensitive". Two bits more are worth a factor of about 16, and two bits more are what mlx-lm's mixed recipe
4_6 and llama.cpp's K mixes give these very matrices. Where two steps are worth the same, the sensitive layers and the
later ones go first. Nothing is measured, so it costs nothing and works from headers; the activations of a text do not
enter, --calibrate or not.

On the pocket model off its training grid (scripts/pocket/target_size.py): KL at the bytes of 3 uniform bits 0.000047
(uniform: 0.000236), at those of 4 bits 0.0000131 (0.0000184); 1,298 tokens, one text. Between 2 and 3 bits no gain over
recipes of the same bytes is shown: 0.0078 against 0.0041 of 2bit-g32 (3.0 bits per weight) and 0.0110 against 0.0071 of
mixed_2_6 (3.2), means of four texts, 5,455 tokens. A few tokens carry most of that KL: by text the first pair's ratio
lay between 0.68 and 19. Not measured on the 32B.

Does not: look at weights, or know about files beside the codes (`convert.target` does).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from dataclasses import replace

from qwq_mlx.quant.modes import MODES, Packing
from qwq_mlx.quant.recipe import Override, Recipe, is_sensitive_layer, layer_of, recipe_of_text

__all__ = ["SENSITIVE", "allocate_bits", "free_matrices", "recipe_of_bits"]

SENSITIVE = 16.0
"""How many times the error of a sensitive matrix counts."""

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
    steps = [_step(path, _BITS[0], n_layers, output) for path in matrices]
    heapq.heapify(steps)
    while steps:
        _, _, path, wider = heapq.heappop(steps)
        more = (wider - bits[path]) * matrices[path]
        if used + more > budget_bits:
            continue  # a smaller matrix may still fit
        bits[path], used = wider, used + more
        if wider != _BITS[-1]:
            heapq.heappush(steps, _step(path, wider, n_layers, output))
    return bits


def _step(path: str, bits: int, n_layers: int, output: str) -> tuple[float, tuple[bool, int, int], str, int]:
    """From `bits` to the next width, as a heap sorts it: minus its worth, its rank among equals, path, the width."""
    wider = _BITS[_BITS.index(bits) + 1]
    kind, layer = path.rpartition(".")[2], layer_of(path)
    is_in_sensitive = layer is not None and is_sensitive_layer(layer, n_layers)
    counts = SENSITIVE if path == output or (is_in_sensitive and kind in ("v_proj", "down_proj")) else 1.0
    worth = counts * (_error(bits) - _error(wider)) / (wider - bits)
    rank = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    return -worth, (not is_in_sensitive, rank, -n_layers if layer is None else -layer), path, wider


def _error(bits: int) -> float:
    return 1.0 / ((1 << bits) - 1) ** 2


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
