"""What each file tensor of a model folder must look like: the architecture's table, seen through its quantization.

A conversion replaces a matrix `X.weight` (out, in) by codes `X.weight` (out, in * bits / 32) uint32 and `X.scales`
(out, in / group); in mode "affine" both scales and `X.biases` are floats, in the others scales are uint8 and there are
no biases. config.json says so in `quantization`, with one entry for all layers and entries by name for those that
differ (the layout mlx-lm reads): an object, false for a matrix that stays whole, true for the settings of all layers.
What an object leaves out or has as null is MLX's default, as mlx-lm's mixed recipes write `"group_size": null`. Here
that is checked before anything is allocated.

Does not: read files or arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwq_mlx.errors import LoadError, OptionError
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes
from qwq_mlx.quant.modes import Packing

__all__ = ["Packing", "check_layout", "packings"]

_FLOATS = ("BF16", "F16", "F32")
_MAX_NAMES = 20


def packings(
    config_json: Mapping[str, Any], config: Qwen2Config, tensor_names: Mapping[str, Any], *, where: str
) -> dict[str, Packing]:
    """Matrix path (without ".weight") -> its packing; a matrix that stays whole is not in it.

    tensor_names: the names of the folder's tensors; a matrix is packed when its scales are there, as mlx-lm decides it.
    Raises LoadError for settings that MLX does not have.
    """
    settings = config_json.get("quantization")
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise LoadError(f"{where}: quantization is {settings!r}, expected an object. Convert the source again.")
    matrices = [name.removesuffix(".weight") for name, shape in tensor_shapes(config).items() if len(shape) == 2]
    unknown = sorted(name for name, value in settings.items() if isinstance(value, Mapping) and name not in matrices)
    if unknown:
        raise LoadError(
            f"{where}: quantization names {unknown[0]!r}, which is no matrix of this model. Convert the source again."
        )
    result = {}
    for path in matrices:
        layer_settings = settings.get(path, True)
        if layer_settings is not False and f"{path}.scales" in tensor_names:
            is_global = layer_settings is True
            result[path] = _packing(
                settings if is_global else layer_settings, "all layers" if is_global else path, where
            )
    return result


def _packing(settings: Any, name: str, where: str) -> Packing:
    if not isinstance(settings, Mapping):
        raise LoadError(f"{where}: quantization of {name} is {settings!r}, expected an object, true or false.")
    try:
        return Packing.from_settings(settings)
    except OptionError as error:
        raise LoadError(f"{where}: quantization of {name}: {error} Convert the source again.") from error


def check_layout(
    config: Qwen2Config,
    packed: Mapping[str, Packing],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    where: str,
) -> None:
    """Compare the folder's tensors (name -> safetensors dtype, shape) with what the config and its packing ask for.

    Raises LoadError naming every tensor that is missing, unknown, misshaped, or of another type.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        path = name.removesuffix(".weight")
        packing = packed.get(path)
        if packing is None:
            shapes[name] = shape
            continue
        rows, columns = shape
        if columns % packing.group_size or columns * packing.bits % 32:
            raise LoadError(
                f"{where}: {name} has {columns} columns, which groups of {packing.group_size} at {packing.bits} bits "
                "do not divide. Convert the source again."
            )
        shapes[name], dtypes[name] = (rows, columns * packing.bits // 32), ("U32",)
        shapes[f"{path}.scales"] = (rows, columns // packing.group_size)
        if packing.is_affine:
            shapes[f"{path}.biases"] = shapes[f"{path}.scales"]
        else:
            dtypes[f"{path}.scales"] = ("U8",)
    check_tensors(shapes, {name: shape for name, (_, shape) in tensors.items()}, where=where)
    wrong = [
        f"{name} {dtype}, expected {' or '.join(dtypes.get(name, _FLOATS))}"
        for name, (dtype, _) in sorted(tensors.items())
        if dtype not in dtypes.get(name, _FLOATS)
    ]
    if wrong:
        more = f" and {len(wrong) - _MAX_NAMES:,} more" if len(wrong) > _MAX_NAMES else ""
        raise LoadError(
            f"{where}: {len(wrong):,} of another type: {', '.join(wrong[:_MAX_NAMES])}{more}. "
            "Config and shards must come from the same conversion; convert the source again."
        )
