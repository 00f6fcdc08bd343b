"""Out of a loop by heat: from before it, draw with a higher temperature for a stretch, then as before.

Each nudge is hotter than the last and has another stream of random numbers (a salt), so the same loop is not drawn
again; after `MAX_NUDGES` the run gives up and asks for the answer.

Does not: find loops, or rewind anything.
"""

from __future__ import annotations

from dataclasses import replace

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.options import Sampling

__all__ = ["MAX_NUDGES", "STRETCH", "Nudges"]

MAX_NUDGES = 3
STRETCH = 128
"""Tokens that are drawn with the higher temperature."""

_STEPS = (1.0, 1.3, 1.6)  # temperatures at least, by nudge; QwQ is used at 0.6 to 0.7


class Nudges:
    """Counts the nudges of one run and makes their samplers."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._n_nudges = 0
        self._n_left = 0
        self._after: Sampler | None = None

    @property
    def is_spent(self) -> bool:
        """Whether there were as many nudges as there may be."""
        return self._n_nudges >= MAX_NUDGES

    def sampler(self, current: Sampler) -> Sampler:
        """The sampler of the next nudge; `count` puts back one of the run's own temperature after the stretch."""
        temperature = max(_STEPS[self._n_nudges], self._sampling.temperature or 0.0)
        self._n_nudges += 1
        self._n_left = STRETCH
        self._after = current.other(self._sampling, salt=self._n_nudges)
        return current.other(replace(self._sampling, temperature=temperature), salt=self._n_nudges)

    @property
    def state(self) -> tuple[int, int]:
        """Nudges so far, and tokens left of the stretch under way."""
        return self._n_nudges, self._n_left

    def restored(self, state: tuple[int, int], base: Sampler) -> Sampler:
        """Take over a saved state; returns the sampler that was drawing. base: the run's first one."""
        n_nudges, n_left = state
        if not n_nudges:
            return base
        self._n_nudges = n_nudges - 1
        hot = self.sampler(base)
        self._n_left = n_left
        return hot if n_left or self._after is None else self._after

    def count(self, decoder: Decoder) -> None:
        """One token more; at the end of a stretch the decoder goes on with the run's own temperature."""
        if self._n_left:
            self._n_left -= 1
            if self._n_left == 0 and self._after is not None:
                decoder.sampler = self._after
