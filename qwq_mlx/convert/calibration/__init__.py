"""Layers packed by what a calibration text feeds them with."""

__all__ = ["BUNDLED"]

BUNDLED = "qwq"
"""Names the text that comes with the package, qwq.jsonl: what QwQ-32B-Preview thought aloud on 10 riddles of
MisguidedAttention, 39 outputs cut at 4,000 characters (CC0-1.0), and on 39 family puzzles of farel-bench (MIT;
farel-bench.LICENSE). 65,613 tokens of Qwen2.5, both kinds from the beginning on in about the same shares.
"""
