"""Everything that can refuse a conversion before anything is written: the source, the recipe on it, output and disk.

Cheap checks first; each names what it found, all differences at once.

Does not: read weights (a NaN is found when its block is) or write anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qwq_mlx.convert.plan import Plan
from qwq_mlx.convert.plan_text import size_text
from qwq_mlx.convert.source_warnings import packing_keys
from qwq_mlx.errors import ConversionError, DiskFullError, OptionError
from qwq_mlx.files.checkpoint import CONFIG_NAME, Checkpoint
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes
from qwq_mlx.model.generation_config import read_generation_defaults
from qwq_mlx.model.tensor_types import FLOAT_TYPES, check_float_types, listed
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quant.gguf_blocks import check_decoder
from qwq_mlx.quant.packing import DTYPES
from qwq_mlx.quant.recipe import Recipe

__all__ = [
    "check_calibration_fits_some",
    "check_disk",
    "check_fit",
    "check_output",
    "check_scale_dtype",
    "check_source",
    "partial_path",
]

_MARGIN = 1.05  # file systems need a little more than the bytes


def check_source(checkpoint: Checkpoint, recipe: Recipe) -> Qwen2Config:
    """Compare a checkpoint with its architecture and with what the recipe wants of it; returns the checked config.

    Raises LoadError (config, tensors, tokenizer), SourceError (dtypes), ConversionError (already packed, a width that
    the group does not divide), RecipeError (a pattern that fits nothing).
    """
    config = Qwen2Config.from_json(checkpoint.config, where=str(checkpoint.folder / CONFIG_NAME))
    shapes = tensor_shapes(config)
    _check_is_whole(checkpoint, shapes)
    check_tensors(
        shapes, {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}, where=str(checkpoint.where)
    )
    check_float_types(checkpoint, checkpoint.tensors)
    check_decoder(entry.dtype for _, entry in checkpoint.tensors.values())
    _check_recipe(checkpoint, config, recipe)
    load_tokenizer(checkpoint.folder, vocab_size=config.vocab_size)
    read_generation_defaults(checkpoint.folder, vocab_size=config.vocab_size)
    return config


def _check_is_whole(checkpoint: Checkpoint, shapes: Mapping[str, object]) -> None:
    """Refuse packed weights. An entry left behind beside floats under the model's own names is no such thing."""
    keys = packing_keys(checkpoint)
    names = [name for name, (_, entry) in checkpoint.tensors.items() if name not in shapes or entry.dtype not in DTYPES]
    if keys and names:
        raise ConversionError(
            f"{checkpoint.folder / CONFIG_NAME}: has {' and '.join(keys)}, so its weights are packed already "
            f"({listed(names)}), expected a bfloat16, float16 or float32 checkpoint. Give the original model as the "
            "source."
        )


def _check_recipe(checkpoint: Checkpoint, config: Qwen2Config, recipe: Recipe) -> None:
    matrices = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items() if len(entry.shape) == 2}
    n_layers = config.num_hidden_layers
    recipe.check_matches([name.removesuffix(".weight") for name in matrices], n_layers=n_layers)
    odd = []
    for name, (_, columns) in matrices.items():
        packing = recipe.packing_of(name.removesuffix(".weight"), n_layers=n_layers)
        if packing is not None and columns % packing.group_size:
            odd.append(f"{name} has rows of {columns:,}, the group is {packing.group_size}")
    if odd:
        raise ConversionError(
            f"{checkpoint.where}: {len(odd):,} matrices whose rows the group does not divide: "
            f"{listed(odd)} (recipe {recipe.name}). Use a smaller group_size, or an override with keep."
        )


def check_fit(recipe: Recipe, calibrate: str | Path | None) -> None:
    """Refuse a recipe and a calibration text that do not go together. Raises OptionError."""
    if calibrate is None:
        if recipe.fit == "calibrated":
            raise OptionError(
                f"{recipe.path}: the fit 'calibrated' needs a text to fit to. Give one as `calibrate`, or take "
                "a recipe whose fit is 'least-squares'."
            )
        return
    packings = [recipe.packing, *(each.packing for each in recipe.overrides)]
    if modes := sorted({each.mode for each in packings if each is not None and not each.is_affine}):
        raise OptionError(
            f"calibrate is {str(calibrate)!r}, which chooses scales and biases of mode 'affine', but {recipe.name} has "
            f"{', '.join(modes)}. Leave `calibrate` out, or take a recipe that is affine throughout."
        )


def check_calibration_fits_some(plan: Plan) -> None:
    """Refuse a calibration that would read its text for nothing. Raises OptionError."""
    inputs = () if plan.config.tie_word_embeddings else ("model.embed_tokens.weight",)  # whose input is an id
    if plan.calibration is None or any(each.is_fitted and each.source.name not in inputs for each in plan.tensors):
        return
    where = plan.checkpoint.where
    packed = [each for each in plan.tensors if each.packing is not None]
    if packed and all(each.is_repacked for each in packed):
        why = f"every matrix of {where} keeps its codes"
    else:
        why = f"{plan.recipe.name} packs no matrix of {where} anew that the text is fed to"
    raise OptionError(
        f"calibrate is {plan.calibration.name!r}, but {why}, so that nothing is fitted. Leave `calibrate` out, or "
        "choose a `recipe` of other bits."
    )


def check_scale_dtype(name: str | None, checkpoint: Checkpoint) -> str | None:
    """The type that a GGUF's scales and biases are stored in (DTYPES); None for a source that is no GGUF.

    name: as numpy and MLX spell it; None is bfloat16, which Qwen2 computes in. Raises OptionError.
    """
    if checkpoint.gguf is None:
        if name is not None:
            raise OptionError(
                f"scale_dtype is {name!r}, but {checkpoint.folder} is no GGUF: its scales get the type of its weights. "
                "Leave `scale_dtype` out."
            )
        return None
    dtypes = {spelt: dtype for dtype, spelt in FLOAT_TYPES.items()}
    if name is not None and name not in dtypes:
        raise OptionError(f"scale_dtype is {name!r}, expected one of {', '.join(dtypes)}.")
    return "BF16" if name is None else dtypes[name]


def check_output(output: Path, source: Path | None, *, force: bool) -> None:
    """Refuse an output that exists, that is not a folder's name, or that touches the source.

    source: the source's folder; None where it is fetched. Raises ConversionError. With force an existing folder is
    accepted only if it holds a model (a config.json), so that a slip of the hand does not replace something else.
    """
    resolved = output.resolve()
    if source is not None and (resolved.is_relative_to(source.resolve()) or source.resolve().is_relative_to(resolved)):
        raise ConversionError(
            f"{output}: lies in the source {source}, or holds it. Choose an output folder apart from the source."
        )
    if os.path.lexists(output) and not output.is_dir():
        raise ConversionError(f"{output}: is not a folder. Choose another output.")
    if output.is_dir() and not force:
        raise ConversionError(
            f"{output}: exists already. Choose another output, or pass `force=True` to replace it "
            "once the new one is complete."
        )
    if output.is_dir() and not (output / CONFIG_NAME).is_file() and any(output.iterdir()):
        raise ConversionError(
            f"{output}: holds files but no {CONFIG_NAME}, so it is not a model that `force=True` may replace. "
            "Choose another output, or remove the folder yourself."
        )
    existing = _existing_parent(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConversionError(
            f"{output}: cannot be made, {existing} is not a folder one may write in. Choose another output."
        )


def check_disk(output: Path, peak_bytes: int) -> None:
    """Refuse when the disk has less than what goes there and 5 %; what an unfinished conversion already takes counts.

    peak_bytes: what the output takes at its peak, with what is fetched. Raises DiskFullError with the figures.
    """
    partial = partial_path(output)
    held = sum(p.stat().st_blocks * 512 for p in partial.rglob("*") if p.is_file()) if partial.is_dir() else 0
    needed = int(peak_bytes * _MARGIN) - held
    free = shutil.disk_usage(_existing_parent(output)).free
    if free < needed:
        raise DiskFullError(
            f"{output}: needs {size_text(needed)} more on its disk, {size_text(free)} are free. "
            "Free some space or choose an output on another disk."
        )


def partial_path(output: Path) -> Path:
    """The folder beside the output that an unfinished conversion lives in."""
    return output.with_name(f"{output.name}.partial")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))
