"""Scale and bias of each group by least squares: better weights than min/max in the same bytes.

Min/max puts the outermost codes on the outermost weights, though rounding all the others a little finer is worth more
than hitting those two. Here a line is moved, the weights are rounded to it, and the line that fits those codes best is
known in closed form (a regression of weights on codes). The first moves all start from min/max's own line, the later
ones from the best refit so far. Few local steps end in a poor minimum, so the moves are fixed and not small; they were
searched for together (normal and t(5) weights, groups of 64, 2 to 5 bits, 4 counting most). Errors may count by the
importance of their input channel (`error_feedback` says by which).

Does not: compute (`fit_kernel` does on the processor, `device_feedback` on a GPU).
"""

from __future__ import annotations

__all__ = ["LANES", "MOVES", "ROWS", "SMALLEST_STEP", "STARTS"]

STARTS = ((0.0, 0.0), (-0.4, 0.4), (-1.2, -0.4), (-0.8, 0.0))
"""Moves of min/max's line, the first of them none; each in codes: how much longer the range gets, how far it shifts."""
MOVES = ((0.0, 0.12), (0.15, -0.12))
"""Moves of the best line so far, one after the other."""

SMALLEST_STEP = 1e-7
"""The smallest scale of min/max, as in MLX."""

LANES = 64
"""Groups that the kernel has side by side: weights and steps of groups of 64 take 32 KB, less than the first cache."""
ROWS = 20
"""Of LANES numbers each, that the kernel keeps beside their weights and steps."""
