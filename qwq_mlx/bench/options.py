"""How much a benchmark measures, as checked numbers.

Does not: import MLX, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_mlx.errors import OptionError
from qwq_mlx.facts import QWQ_32B_PREVIEW

__all__ = ["BenchOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How much is measured.

    n_tokens: of a decode run.
    repeats: measured runs of each contestant.
    n_layers: of the QwQ-shaped random model; 0 leaves it out.
    is_shaped_only: the model folder is left out.
    contexts: positions in the cache before a decode run.
    n_prompt: tokens of a prefill run.
    rows: numbers of rows in a pass.
    chunks: ids of a newcomer's prompt between two passes of others.
    """

    n_tokens: int = 64
    repeats: int = 5
    n_layers: int = 2
    is_shaped_only: bool = False
    contexts: tuple[int, ...] = (0,)
    n_prompt: int = 512
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    chunks: tuple[int, ...] = (64, 256)

    def __post_init__(self) -> None:
        for name, values, low, high in (
            ("n_tokens", (self.n_tokens,), 2, 30_000),
            ("repeats", (self.repeats,), 1, 10_000),
            ("n_layers", (self.n_layers,), 0, QWQ_32B_PREVIEW.num_hidden_layers),
            ("contexts", self.contexts, 0, 1_000_000),
            ("n_prompt", (self.n_prompt,), 2, 1_000_000),
            ("rows", self.rows, 1, 1024),
            ("chunks", self.chunks, 1, 1_000_000),
        ):
            for value in values:
                if type(value) is not int or not low <= value <= high:
                    raise OptionError(f"{name} is {value!r}, expected a whole number from {low} to {high:,}.")
        if self.is_shaped_only and self.n_layers == 0:
            raise OptionError("the model folder and the QwQ-shaped model are both left out. Give n_layers 1 to 64.")
