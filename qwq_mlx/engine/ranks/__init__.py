"""Several processes hold one model: rank 0 leads (`leader`), the others follow it (`follower`), over links (`link`)."""

from __future__ import annotations

__all__ = ["LEADER_VARIABLE"]

LEADER_VARIABLE = "QWQ_MLX_LEADER"
"""Addresses of rank 0 with commas between them, as `--hosts` tells the others."""
