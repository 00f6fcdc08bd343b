"""config.json and the index of a conversion, in the form of mlx-lm's converter.

Does not: write them (`finalize` does), or choose packings (the recipe does).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.header import TensorEntry
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.model.load import packing_arguments
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import Recipe

__all__ = ["make_config", "make_index"]


def make_config(
    checkpoint: Checkpoint, copied: Iterable[str], packings: Mapping[str, Packing | None], recipe: Recipe
) -> bytes:
    """The source's config.json with what mlx-lm's converter adds and drops, in its form: sorted, 4 spaces.

    Keys that name code of the repository are dropped too: that code is never copied, so nothing may point to it.
    packings: of every matrix, by tensor name.
    """
    dropped = ("_name_or_path", "vision_config", "auto_map", "model_file")
    config: dict[str, Any] = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    if "generation_config.json" in copied:
        generation = read_json_object(
            checkpoint.folder / "generation_config.json", limit_bytes=1 << 20, advice="Fetch the file again."
        )
        if generation.get("eos_token_id") is not None:
            config["eos_token_id"] = generation["eos_token_id"]
    quantization: dict[str, Any] = packing_arguments(recipe.packing)
    for name, packing in packings.items():
        if packing != recipe.packing:
            quantization[name.removesuffix(".weight")] = False if packing is None else packing_arguments(packing)
    config["quantization"] = config["quantization_config"] = quantization
    return json.dumps(dict(sorted(config.items())), indent=4).encode()


def make_index(places: Mapping[str, tuple[TensorEntry, str]], n_weights: int) -> bytes:
    """Which shard holds each tensor. places: by a tensor's name, its entry and its shard's name."""
    index = {
        "metadata": {
            "total_size": sum(entry.end - entry.start for entry, _ in places.values()),
            "total_parameters": n_weights,
        },
        "weight_map": {name: shard for name, (_, shard) in sorted(places.items())},
    }
    return json.dumps(index, indent=4).encode()
