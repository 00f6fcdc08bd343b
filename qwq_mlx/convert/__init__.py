"""A checkpoint becomes a conversion: plan, read, pack, write, check, publish; `python -m qwq_mlx.convert`.

The parts are imported when they are used, so that the command's --help answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwq_mlx.convert.job import convert_checkpoint
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.progress import ConvertProgress
    from qwq_mlx.convert.result import Conversion

__all__ = ["Conversion", "ConvertProgress", "Plan", "convert_checkpoint"]

_HOMES = {
    "Conversion": "result",
    "Plan": "plan",
    "ConvertProgress": "progress",
    "convert_checkpoint": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
