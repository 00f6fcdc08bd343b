"""What a tuning is asked for, checked.

Does not: read files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwq_mlx.errors import OptionError

__all__ = ["TuneSettings"]

_RATE_OF_LORA, _RATE_OF_ALL = 2e-4, 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """How a drafter is trained.

    all_weights: train every weight (22 bytes of memory for each on a GPU); else LoRA layers on every linear one.
    rank: of the LoRA layers.
    learning_rate: at its highest; None takes 2e-4 for LoRA layers, 2e-5 for all weights.
    epochs: times that every trace is read.
    batch_tokens: ids in a step, about.
    max_length: ids of a window; longer traces are cut into windows that overlap.
    held_out_share: of the problems, that are measured on and not trained on.
    seed: of the order of batches, the first LoRA weights and the problems that are held out.

    Raises OptionError for a value that cannot be honoured.
    """

    all_weights: bool = False
    rank: int = 16
    learning_rate: float | None = None
    epochs: int = 3
    batch_tokens: int = 4096
    max_length: int = 2048
    held_out_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rank", 1, 1024),
            ("epochs", 1, 1000),
            ("batch_tokens", 16, 1 << 24),
            ("max_length", 16, 1 << 20),
            ("seed", 0, 1 << 32),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {least:,} to {most:,}.")
        if self.max_length % 2:
            raise OptionError(f"max_length is {self.max_length}, expected an even number: windows overlap by half.")
        if not 0 < self.held_out_share < 1:
            raise OptionError(f"held_out_share is {self.held_out_share!r}, expected a number between 0 and 1.")
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1):
            raise OptionError(f"learning_rate is {rate!r}, expected a number above 0, at most 1.")

    @property
    def highest_rate(self) -> float:
        """The learning rate behind the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _RATE_OF_ALL if self.all_weights else _RATE_OF_LORA
