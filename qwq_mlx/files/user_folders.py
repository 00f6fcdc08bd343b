"""Where the package keeps what is this user's own, by the system's custom.

A relative path in $XDG_CACHE_HOME or $XDG_DATA_HOME counts as none, as their specification has it: code and models
would be taken from whatever folder a command is started in.

Does not: make the folders.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["user_cache_folder", "user_data_folder"]


def user_cache_folder(environment: Mapping[str, str]) -> Path:
    """This user's cache folder for the package: $XDG_CACHE_HOME, ~/Library/Caches on macOS, ~/.cache elsewhere."""
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "qwq-mlx"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "qwq-mlx"


def user_data_folder(environment: Mapping[str, str]) -> Path:
    """This user's data folder for the package: $XDG_DATA_HOME, ~/Library/Application Support on macOS, ~/.local/share
    elsewhere."""
    base = Path(environment.get("XDG_DATA_HOME", ""))
    if base.is_absolute():
        return base / "qwq-mlx"
    return Path.home() / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "qwq-mlx"
