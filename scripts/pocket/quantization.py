"""MLX's affine quantization as a rounding of weights in PyTorch, so that training can prepare a model for it.

Small models lose more to four bits than large ones: their answers hang on thousands of exact tokens. In the last part
of training every other step therefore computes with the weights that a 4-bit conversion would hold, while the gradient
updates the full ones (straight-through estimation, Jacob et al. 2018, arXiv 1712.05877).

Does not: pack anything; qwq_mlx.quant does. tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["quantized_weights", "round_to_grid"]

GROUP_SIZE, BITS = 64, 4
_EPSILON = 1e-7


@torch.no_grad()
def round_to_grid(weight: torch.Tensor) -> torch.Tensor:
    """The float32 values that min/max 4-bit quantization of the bfloat16-rounded `weight` (rows, columns) stores."""
    groups = weight.to(torch.bfloat16).float().unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**BITS - 1)).clamp_min(_EPSILON)
    low_is_edge = low.abs() > high.abs()
    scale = torch.where(low_is_edge, scale, -scale)
    edge = torch.where(low_is_edge, low, high)
    code = (edge / scale).round()
    scale = torch.where(code == 0, scale, edge / code)
    bias = torch.where(code == 0, torch.zeros_like(edge), edge)
    codes = ((groups - bias) / scale).round().clamp(0, 2**BITS - 1)  # MLX picks codes before it rounds the two
    return (codes * scale.to(torch.bfloat16).float() + bias.to(torch.bfloat16).float()).flatten(-2)


@contextmanager
def quantized_weights(model: nn.Module) -> Iterator[None]:
    """Every matrix of `model` on the 4-bit grid while the block runs; the full weights come back after it."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    full = [parameter.data.clone() for parameter in matrices]
    for parameter in matrices:
        parameter.data.copy_(round_to_grid(parameter.data))
    try:
        yield
    finally:
        for parameter, kept in zip(matrices, full, strict=True):
            parameter.data.copy_(kept)
