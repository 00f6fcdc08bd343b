"""Layers packed by what a calibration text feeds them with."""

__all__ = ["BUNDLED"]

BUNDLED = "qwq"
"""Names the text that comes with the package: what QwQ-32B-Preview thought aloud on 13 riddles (qwq.jsonl; CC0)."""
