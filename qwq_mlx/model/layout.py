"""What each file tensor of a model folder must look like: the architecture's table, seen through its quantization.

A conversion replaces a matrix `X.weight` (out, in) by three tensors: codes `X.weight` (out, in * bits / 32) uint32, and
`X.scales`, `X.biases` (out, in / group). config.json says so in `quantization`, with one entry for all layers and
entries by name for those that differ (the layout mlx-lm reads). Here that is checked before anything is allocated.

Does not: read files or arrays, or know modes other than "affine".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwq_mlx.errors import LoadError
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes

__all__ = ["Packing", "check_layout", "packings"]

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_FLOATS = ("BF16", "F16", "F32")
_MAX_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one matrix is packed: bits per weight and weights per group."""

    bits: int
    group_size: int


def packings(
    config_json: Mapping[str, Any], config: Qwen2Config, found: Mapping[str, Any], *, where: str
) -> dict[str, Packing]:
    """Matrix path (without ".weight") -> its packing; a matrix that stays whole is not in it.

    found: the names of the folder's tensors; a matrix is packed when its scales are there, as mlx-lm decides it.
    Raises LoadError for settings that MLX's affine mode does not have.
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
        own = settings.get(path, settings)
        if own is not False and f"{path}.scales" in found:
            result[path] = _packing(own, path if path in settings else "quantization", where)
    return result


def _packing(settings: Any, name: str, where: str) -> Packing:
    if not isinstance(settings, Mapping):
        raise LoadError(f"{where}: quantization of {name} is {settings!r}, expected an object or false.")
    mode = settings.get("mode", "affine")
    if mode != "affine":
        raise LoadError(f"{where}: quantization mode of {name} is {mode!r}, expected 'affine', the one qwq_mlx runs.")
    for field, allowed in (("bits", _BITS), ("group_size", _GROUPS)):
        value = settings.get(field)
        if type(value) is not int or value not in allowed:
            raise LoadError(
                f"{where}: {field} of {name} is {value!r}, expected one of {allowed}. Convert the source again."
            )
    return Packing(bits=settings["bits"], group_size=settings["group_size"])


def check_layout(
    config: Qwen2Config,
    packed: Mapping[str, Packing],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    where: str,
) -> None:
    """Compare the folder's tensors (name -> safetensors dtype, shape) with what the config and its packing ask for.

    Raises LoadError naming every tensor that is missing, unknown, misshaped, or of another type.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    codes = set()
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
        codes.add(name)
        shapes[name] = (rows, columns * packing.bits // 32)
        shapes[f"{path}.scales"] = shapes[f"{path}.biases"] = (rows, columns // packing.group_size)
    check_tensors(shapes, {name: shape for name, (_, shape) in found.items()}, where=where)
    wrong = [
        f"{name} {dtype}, expected {'U32' if name in codes else ' or '.join(_FLOATS)}"
        for name, (dtype, _) in sorted(found.items())
        if dtype not in (("U32",) if name in codes else _FLOATS)
    ]
    if wrong:
        more = f" and {len(wrong) - _MAX_NAMES:,} more" if len(wrong) > _MAX_NAMES else ""
        raise LoadError(
            f"{where}: {len(wrong):,} of another type: {', '.join(wrong[:_MAX_NAMES])}{more}. "
            "Config and shards must come from the same conversion; convert the source again."
        )
