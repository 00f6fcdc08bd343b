"""The recipe that a GGUF is converted by where none is named: what MLX can hold stays as it is.

A matrix whose blocks MLX can hold gets their bits and groups of 32, and so keeps its codes. Any other quantized one is
fitted anew, at the bits below, so that the output is about as large as the file; it is never kept in 16 bits. A file of
floats alone is converted by the default recipe, as any checkpoint.

Does not: look at weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qwq_mlx.convert.preflight import check_source
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.gguf.checkpoint import opened_gguf
from qwq_mlx.files.gguf.stores import GgufFile
from qwq_mlx.files.gguf.types import FLOAT_TYPES
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.memory.plan import ModelShape
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.allocate import recipe_of_packings
from qwq_mlx.quant.gguf_blocks import packing_that_holds
from qwq_mlx.quant.modes import Packing
from qwq_mlx.quant.recipe import Recipe, load_recipe

__all__ = ["gguf_recipe", "shape_of_gguf"]

_NAME = "repack"
_FIT = "least-squares"
# Bits and group of a refit, by the beginning of the type's name. Below 4 bits a second rounding at the same width costs
# more than the first did, so they get more.
_REFITTED: Mapping[str, tuple[int, int]] = {
    "Q6_K": (6, 64),
    "IQ4": (4, 32),
    "MXFP4": (4, 32),
    "Q3_K": (4, 64),
    "IQ3": (4, 64),
    "Q2_K": (3, 32),
    "IQ2": (3, 32),
    "IQ1": (3, 64),
    "TQ": (3, 64),
}
_FLOATS = (8, 64)  # embeddings or the output, beside matrices that are quantized


def gguf_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe of a GGUF, from the types in its header."""
    matrices = {name: entry for name, (_, entry) in checkpoint.tensors.items() if len(entry.shape) == 2}
    if all(entry.dtype in FLOAT_TYPES for entry in matrices.values()):
        return load_recipe(DEFAULT_RECIPE)
    packings = {
        name.removesuffix(".weight"): packing_that_holds(entry.dtype) or _refitted(entry.dtype)
        for name, entry in matrices.items()
    }
    base = replace(load_recipe(DEFAULT_RECIPE), fit=_FIT, overrides=())
    return recipe_of_packings(base, packings, name=_NAME, how="the types of a GGUF, where MLX can hold them")


def shape_of_gguf(file: GgufFile) -> ModelShape:
    """The shape of a GGUF's conversion by `gguf_recipe`, for a memory plan, from its header. Raises as `open_gguf`."""
    with opened_gguf(file) as checkpoint:
        recipe = gguf_recipe(checkpoint)
        config = check_source(checkpoint, recipe)
    paths = [name.removesuffix(".weight") for name, shape in tensor_shapes(config).items() if len(shape) == 2]
    chosen = {path: recipe.packing_of(path, n_layers=config.num_hidden_layers) for path in paths}
    return ModelShape(config=config, packed={path: each for path, each in chosen.items() if each is not None})


def _refitted(dtype: str) -> Packing:
    bits, group_size = next((each for start, each in _REFITTED.items() if dtype.startswith(start)), _FLOATS)
    return Packing(bits=bits, group_size=group_size)
