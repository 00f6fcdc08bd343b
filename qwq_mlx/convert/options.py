"""What may be chosen about a conversion beside source, output and recipe.

Does not: check values (the job does, before anything slow).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ConvertOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Every field is a keyword of `convert_checkpoint` and explained there. They hold for all outputs of a run.

    With several outputs keep_source leaves what is fetched beside the first.
    """

    revision: str | None = None
    target_bytes: int | None = None
    calibrate: str | Path | None = None
    force: bool = False
    restart: bool = False
    keep_source: bool = False
    dry_run: bool = False
    n_workers: int | None = None
    quality: str | Path | bool | None = None
    quality_tokens: int | None = None
