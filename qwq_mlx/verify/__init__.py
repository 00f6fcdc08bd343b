"""Is a conversion what its manifest says, and what its source makes? `python -m qwq_mlx.verify DIR` answers.

The parts are imported when they are used, so that the command's --help answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwq_mlx.verify.check import Verification, verify_conversion

__all__ = ["Verification", "verify_conversion"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qwq_mlx.verify import check

    return getattr(check, name)
