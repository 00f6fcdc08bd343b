"""The types of a checkpoint's float tensors: mixtures that only damage makes are refused, odd ones are told.

Does not: read weights (`weight_values` looks at them), or look at the types of packed tensors (`layout` does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qwq_mlx.errors import SourceError
from qwq_mlx.files.checkpoint import CONFIG_NAME, Checkpoint

__all__ = ["FLOAT_TYPES", "check_float_types", "float_type_warnings", "listed"]

FLOAT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that weights have in safetensors, with their names in config.json."""

_MAX_NAMES = 10


def check_float_types(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Floats alone. Some programs keep norms in float32; none mixes the two 16-bit types, but a flipped label does.

    names: of the tensors to look at. Raises SourceError naming every tensor of another type.
    """
    if checkpoint.gguf is not None:
        return  # its header has types that are known, and files of several types are the rule
    names_by_type: dict[str, list[str]] = {}
    for name in names:
        names_by_type.setdefault(checkpoint.tensors[name][1].dtype, []).append(name)
    most = max(names_by_type, key=lambda dtype: len(names_by_type[dtype]))
    wrong = {
        dtype: others
        for dtype, others in names_by_type.items()
        if dtype not in FLOAT_TYPES or (dtype != most and {dtype, most} == {"BF16", "F16"})
    }
    if wrong:
        lines = "; ".join(f"{dtype}: {listed(others)}" for dtype, others in sorted(wrong.items()))
        raise SourceError(
            f"{checkpoint.folder}: tensors of another type than {most}, which most of them have: {lines}. Expected one "
            f"of {', '.join(FLOAT_TYPES)}, and not both 16-bit types. Fetch the shards again, all from one commit."
        )


def float_type_warnings(checkpoint: Checkpoint) -> list[str]:
    """Sentences about a checkpoint of floats that has several types, or another than config.json says."""
    if checkpoint.gguf is not None:
        return []
    types = Counter(entry.dtype for _, entry in checkpoint.tensors.values())
    (most, n_most), *fewer = types.most_common()
    warnings = []
    if fewer:
        others = ", ".join(f"{n:,} of {dtype}" for dtype, n in fewer)
        warnings.append(f"{checkpoint.folder}: {others} among {n_most:,} tensors of {most}; each keeps its type.")
    label = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
    name = str(label).removeprefix("torch.")
    if label is not None and name != "auto" and name not in {FLOAT_TYPES.get(dtype) for dtype in types}:
        where = checkpoint.folder / CONFIG_NAME
        warnings.append(f"{where}: torch_dtype {label!r:.80} is ignored: the tensors are {FLOAT_TYPES[most]}.")
    return warnings


def listed(names: Iterable[str]) -> str:
    """Names of tensors in order, the first of many."""
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return f"{', '.join(names[:_MAX_NAMES])}{more}"
