"""A size in place of a number of bits: the recipe whose output fits it, from the source's headers.

The size is that of the planned output: weights, config, index and the copied files. manifest.json and report.html come
on top (half a MB for the 32B). `quant.allocate` chooses the packings; here they are fitted to the files to the byte.

Does not: read a weight, or find the best of all recipes of a size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qwq_mlx.convert.plan import make_plan
from qwq_mlx.convert.source import Origin
from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.quant.allocate import allocate, free_matrices, ladder, rate, recipe_of_packings
from qwq_mlx.quant.modes import MODES, Packing
from qwq_mlx.quant.recipe import Recipe

__all__ = ["recipe_for_size"]


def recipe_for_size(
    origin: Origin, config: Qwen2Config, recipe: Recipe, target_bytes: int, *, scale_dtype: str | None
) -> Recipe:
    """The recipe with its bits chosen, so that the output has at most `target_bytes`.

    Mode, fit and overrides stay the recipe's; matrices that an override names keep what it says. Groups are the
    recipe's or larger, where these divide every row. scale_dtype: as in `Plan`.
    Raises OptionError: a mode without a choice of bits, nothing to choose, or a size that even the fewest bits exceed,
    with the smallest that can be reached.
    """
    if type(target_bytes) is not int or target_bytes <= 0:
        raise OptionError(f"target_bytes is {target_bytes!r}, expected a whole number of bytes above 0.")
    if not recipe.packing.is_affine:
        raise OptionError(
            f"{recipe.path}: mode {recipe.packing.mode!r} has one number of bits, so a target size cannot choose. "
            "Take a recipe of mode 'affine', 4bit for instance."
        )
    tensors = origin.checkpoint.tensors.items()
    matrices = {n.removesuffix(".weight"): math.prod(e.shape) for n, (_, e) in tensors if len(e.shape) == 2}
    n_layers = config.num_hidden_layers
    free = free_matrices(recipe, matrices, n_layers=n_layers)
    if not free:
        raise OptionError(
            f"{recipe.path}: its overrides name every matrix, so a target size has nothing to choose. "
            "Leave one of the two out."
        )
    name = f"{recipe.name}-{_size(target_bytes)}"
    head = config.output_matrix
    group_size = recipe.packing.group_size
    columns = {entry.shape[1] for _, (_, entry) in tensors if len(entry.shape) == 2}
    larger = [g for g in MODES["affine"][1] if g > group_size and not any(n % g for n in columns)]
    rungs = ladder((group_size, *larger))

    def made(packings: Mapping[str, Packing]) -> tuple[Recipe, int]:
        chosen = recipe_of_packings(recipe, packings, name=name)
        plan = make_plan(origin, config, chosen, n_workers=1, keep_source=False, scale_dtype=scale_dtype)
        return chosen, plan.output_bytes

    chosen, output_bytes = made(dict.fromkeys(free, rungs[0]))
    if output_bytes > target_bytes:
        raise OptionError(_unreachable(recipe, rungs[0], target_bytes, output_bytes))
    budget_bits = rate(rungs[0]) * sum(free.values()) + 8 * (target_bytes - output_bytes)
    while True:  # what the files hold beside the codes depends on the choice, by some kB: take them off and try again
        packings = allocate(free, rungs, n_layers=n_layers, output=head, budget_bits=budget_bits)
        chosen, output_bytes = made(packings)
        if output_bytes <= target_bytes:
            return chosen
        budget_bits -= 8 * (output_bytes - target_bytes)


def _unreachable(recipe: Recipe, lowest: Packing, target_bytes: int, smallest_bytes: int) -> str:
    ways = [f"Give {_size(smallest_bytes)} or more"]
    if recipe.overrides:
        ways.append("or a recipe without overrides")
    return (
        f"a target size of {_size(target_bytes)} cannot be reached: the smallest that {recipe.name} makes of this "
        f"model, {lowest.bits} bits in groups of {lowest.group_size} everywhere, has {smallest_bytes:,} bytes. "
        f"{', '.join(ways)}."
    )


def _size(n_bytes: int) -> str:
    """Rounded up: 17GB, 2.154MB."""
    unit, scale = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)
    return f"{math.ceil(1000 * n_bytes / scale) / 1000:.3f}".rstrip("0").rstrip(".") + unit
