"""What training holds in memory, from headers alone, before a weight is read.

    weights       in the compute type; where all are trained, as they were and as they are now
    training      of each trained weight the number and Adam's two moments, of which one is there twice for a moment,
                  and the gradient in float32, and the gradient once more in the compute type
    activations   what enters each layer, for layers are recomputed in the backward pass; one layer's intermediates and
                  their gradients; the scores of attention, which a gradient may need on any backend
    logits        of `CHUNK` places, their gradient and what the loss makes of both

Does not: know what else the machine does. The factors of one layer come from the peaks of small models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qwq_mlx.errors import FitError
from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes
from qwq_mlx.model.memory.plan import RESERVE_BYTES, Backend
from qwq_mlx.tune_draft.settings import TuneSettings
from qwq_mlx.tune_draft.tokens_a_pass import CHUNK

__all__ = ["check_fits", "n_trained", "training_bytes"]

_GATES, _HIDDENS = 12, 12  # of one layer, forward and backward, by its MLP's width and its hidden size
_SCORES = 4  # of attention: scores, mask, weights, their gradient
_LOGITS = 5


def n_trained(config: Qwen2Config, settings: TuneSettings) -> int:
    """Numbers that are trained."""
    shapes = tensor_shapes(config)
    if settings.all_weights:
        return sum(math.prod(shape) for shape in shapes.values())
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    return sum(settings.rank * sum(shape) for shape in linear)


def training_bytes(config: Qwen2Config, settings: TuneSettings, backend: Backend) -> Mapping[str, int]:
    """The parts of the peak, in bytes."""
    float_bytes = 4 if backend == "cpu" else 2
    n_weights = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    n_ids = max(settings.batch_tokens, settings.max_length)
    layer = n_ids * (_GATES * config.intermediate_size + _HIDDENS * config.hidden_size) * float_bytes
    scores = _SCORES * config.num_attention_heads * n_ids * settings.max_length * float_bytes
    return {
        "weights": n_weights * float_bytes * (2 if settings.all_weights else 1),
        "training": n_trained(config, settings) * (20 + float_bytes),
        "activations": (config.num_hidden_layers + 1) * n_ids * config.hidden_size * float_bytes + layer + scores,
        "logits": _LOGITS * min(CHUNK, n_ids) * config.vocab_size * 4,
    }


def check_fits(config: Qwen2Config, settings: TuneSettings, *, limit_bytes: int, backend: Backend) -> int:
    """The planned peak. Raises FitError with the arithmetic where it is above the limit."""
    parts = training_bytes(config, settings, backend)
    peak = sum(parts.values())
    if peak + RESERVE_BYTES <= limit_bytes:
        return peak
    rows = {**parts, "peak": peak, "reserve": RESERVE_BYTES, "limit": limit_bytes}
    arithmetic = "\n".join(f"{name:<12}{size / 1e9:>8.2f} GB" for name, size in rows.items())
    if settings.all_weights:
        advice = "Leave out `all_weights`, which trains LoRA layers"
    elif settings.batch_tokens > settings.max_length or settings.max_length > 1024:
        advice = "Ask for a smaller `batch_tokens` and `max_length`"
    else:
        advice = "Take a smaller drafter or a machine with more memory"
    raise FitError(f"This training does not fit the memory of this machine:\n{arithmetic}\n{advice}.")
