"""The bundled reasoner: a small Qwen2 checkpoint in QwQ-32B-Preview's layout, and the problems it was trained on."""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = Path(__file__).resolve().parent / "checkpoint"
"""The bf16 checkpoint."""
