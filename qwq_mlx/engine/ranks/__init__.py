"""Several processes hold one model: rank 0 leads (`leader`), the others follow it (`follower`), over links (`link`)."""

from __future__ import annotations

__all__ = ["ADDRESSES_VARIABLE"]

ADDRESSES_VARIABLE = "QWQ_MLX_ADDRESSES"
"""Addresses of each rank with commas between them, and semicolons between ranks, as `--hosts` tells all."""
