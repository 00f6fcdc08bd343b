"""What a text feeds matrices with, as sums of products over all its positions: all that a fit takes from a text.

With x the input behind packed layers, x + d what the float model has there, and r what the float model's residual
stream has more where the output is added: sums of x x^T, d x^T and, for a matrix that ends attention or MLP, r x^T. The
first two are of blocks of channels (`quant.error_feedback`), added up in float32 on the device, or by numpy on the CPU.

Does not: run the text, or fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import ConversionError
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.error_feedback import block_size

__all__ = ["InputProducts"]


@dataclass(slots=True)
class InputProducts:
    """Sums over texts. path: of a matrix that is fed so, for messages."""

    path: str
    n_positions: int = 0
    _moments: list[Any] = field(default_factory=list)
    _drifts: list[Any] = field(default_factory=list)
    _residuals: list[Any] = field(default_factory=list)  # one at most
    _spare: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def add(self, x: Any, float_x: Any = None, residual: Any = None) -> None:
        """A text's inputs, (positions, in): x behind packed layers, float_x in the float model. residual: how much more
        the float model's residual stream has, (positions, hidden). Either is always given or never."""
        mx = import_mlx()
        x = x.astype(mx.float32)
        drift = None if float_x is None else float_x.astype(mx.float32) - x
        if mx.default_device().type == mx.cpu:
            x, drift = np.asarray(x), None if drift is None else np.asarray(drift)  # numpy's BLAS: see `model.products`
            residual = None if residual is None else np.asarray(residual.astype(mx.float32))
        step = block_size(x.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            for place, first in enumerate(range(0, x.shape[1], step)):
                part = x[:, first : first + step]
                self._add(self._moments, place, part, part)
                if drift is not None:
                    self._add(self._drifts, place, drift[:, first : first + step], part)
            if residual is not None:
                self._add(self._residuals, 0, residual, x)
        if not isinstance(x, np.ndarray):
            mx.eval(self._moments, self._drifts, self._residuals)  # or the whole text's graph is kept
        self.n_positions += x.shape[0]

    def _add(self, sums: list[Any], place: int, left: Any, right: Any) -> None:
        if not isinstance(right, np.ndarray):
            product = left.astype(right.dtype).T @ right
            sums[place : place + 1] = [sums[place] + product if place < len(sums) else product]
        elif place == len(sums):
            sums.append(left.T @ right)
        else:
            size = sums[place].size
            if len(self._spare) < size:
                self._spare = np.empty(size, np.float32)
            product = self._spare[:size].reshape(sums[place].shape)
            np.matmul(left.T, right, out=product)  # fresh memory for each would cost as much as the product
            sums[place] += product

    def moments(self) -> Iterator[NDArray[np.float64]]:
        """mean(x x^T) of each block; a block's sum is let go as it is asked for.

        This and what follows raise ConversionError where inputs were not finite.
        """
        self._spare = np.empty(0, np.float32)
        while self._moments:
            mean = np.array(self._moments.pop(0), dtype=np.float64) / self.n_positions
            yield self._checked(mean)

    def moments_on_device(self) -> list[Any]:
        """The same as arrays of MLX, float32."""
        sums, self._moments = self._moments, []
        return [self._checked(import_mlx().array(each) / self.n_positions) for each in sums]

    def drifts(self) -> list[Any]:
        """mean(d x^T) of each block, float32; none without a float model. Lets the sums go."""
        sums, self._drifts = self._drifts, []
        return [self._checked(each / self.n_positions) for each in sums]

    def residual(self) -> Any:
        """mean(r x^T), (hidden, in), float32; None where no residual stream was given. Lets the sum go."""
        sums, self._residuals = self._residuals, []
        return self._checked(sums[0] / self.n_positions) if sums else None

    def _checked(self, mean: Any) -> Any:
        if not (np if isinstance(mean, np.ndarray) else import_mlx()).isfinite(mean).all().item():
            raise ConversionError(
                f"The calibration text made activations that are NaN or infinite before {self.path}. The checkpoint is "
                "damaged, or the text is not of its kind; convert without it."
            )
        return mean
