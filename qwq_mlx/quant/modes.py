"""The ways MLX has to pack a matrix: mode, bits and group, refused where MLX has no such thing; the names of the fits.

Does not: import numpy or MLX, so that a recipe, or a plan from headers alone, stays light; `packing` has the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwq_mlx.errors import OptionError

__all__ = ["FITS", "MODES", "Packing"]

FITS = ("min-max", "least-squares", "calibrated")
"""Ways to choose scale, bias and codes (qwq_mlx.quant.fit); a recipe names one. Modes beside affine have the first."""

MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
"""Mode -> the bits and the group sizes that MLX has for it (affine has 1 bit too, which no model survives)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one matrix is packed.

    mode: a key of MODES. bits: per weight. group_size: neighbours along the input axis that share a scale.
    Raises OptionError for a combination that MLX does not have.
    """

    mode: str = "affine"
    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise OptionError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        all_bits, groups = MODES[self.mode]
        for name, value, allowed in (("bits", self.bits, all_bits), ("group_size", self.group_size, groups)):
            if type(value) is not int or value not in allowed:
                listed = ", ".join(map(str, allowed))
                raise OptionError(f"{name} is {value!r}, expected {listed} in mode {self.mode!r}.")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Packing:
        """The packing that `mode`, `bits` and `group_size` of a config.json mean; null or absent is MLX's default.

        Source: mlx.nn.layers.quantized._defaults_for_mode (affine: groups of 64, 4 bits; a test compares the two).
        Raises OptionError for a combination that MLX does not have.

        >>> Packing.from_settings({"bits": 6, "group_size": None})
        Packing(mode='affine', bits=6, group_size=64)
        """
        mode = settings.get("mode")
        mode = "affine" if mode is None else mode
        only = MODES[mode] if isinstance(mode, str) and mode in MODES and mode != "affine" else ((4,), (64,))
        defaults = {"bits": only[0][0], "group_size": only[1][0]}
        values = {name: settings[name] for name in defaults if settings.get(name) is not None}
        return cls(mode=mode, **{**defaults, **values})

    @property
    def is_affine(self) -> bool:
        """Whether weight = scale * code + bias; the other modes have 8-bit scales and no bias."""
        return self.mode == "affine"
