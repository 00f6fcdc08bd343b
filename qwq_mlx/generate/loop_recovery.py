"""Out of a loop by temperature: from before it, draw hotter for a stretch, then as before.

Each nudge is hotter than the last and has another stream of random numbers (a salt), so the same loop is not drawn
again; after `MAX_NUDGES` the run gives up and asks for the answer.

Does not: find loops, rewind anything, or draw.
"""

from __future__ import annotations

from dataclasses import replace

from qwq_mlx.options import Sampling
from qwq_mlx.trace.trace import Step

__all__ = ["MAX_NUDGES", "STRETCH", "LoopRecovery"]

MAX_NUDGES = 3
STRETCH = 128
"""Tokens that are drawn with the higher temperature."""

_TEMPERATURES = (1.0, 1.3, 1.6)  # at least, by nudge; QwQ is used at 0.6 to 0.7


class LoopRecovery:
    """Counts the nudges of one run, and says how its tokens are drawn."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._n_nudges = 0
        self._n_left = 0

    @property
    def is_spent(self) -> bool:
        """Whether there were as many nudges as there may be."""
        return self._n_nudges >= MAX_NUDGES

    @property
    def sampling(self) -> tuple[Sampling, int]:
        """How to draw from here on, and the salt of the random numbers, which is the number of nudges so far."""
        if not self._n_left:
            return self._sampling, self._n_nudges
        temperature = max(_TEMPERATURES[self._n_nudges - 1], self._sampling.temperature or 0.0)
        return replace(self._sampling, temperature=temperature), self._n_nudges

    def nudge(self) -> None:
        """Begin the stretch of the next nudge."""
        self._n_nudges += 1
        self._n_left = STRETCH

    def feed(self, step: Step) -> None:
        """Take a drawn token; at the end of a stretch the run's own temperature comes back."""
        self._n_left = max(0, self._n_left - 1)

    def dump(self) -> tuple[int, int]:
        """Nudges so far, and tokens left of the stretch under way."""
        return self._n_nudges, self._n_left

    def load(self, state: tuple[int, int]) -> None:
        """Take over a saved state."""
        self._n_nudges, self._n_left = state
