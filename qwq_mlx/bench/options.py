"""What a benchmark may be told, checked before anything heavy is imported.

Does not: import MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_mlx.errors import OptionError
from qwq_mlx.facts import QWQ_32B_PREVIEW

__all__ = ["BenchOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How much is measured.

    n_tokens: per run. repeats: measured runs of each contestant. n_layers: of the QwQ-shaped model; 0 leaves it out.
    """

    n_tokens: int = 64
    repeats: int = 5
    n_layers: int = 2

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("tokens", self.n_tokens, 2, 30_000),
            ("repeats", self.repeats, 1, 10_000),
            ("layers", self.n_layers, 0, QWQ_32B_PREVIEW.num_hidden_layers),
        ):
            if type(value) is not int or not low <= value <= high:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {low} to {high:,}.")
