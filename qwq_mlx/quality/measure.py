"""A reference and one or more models, side by side through the same text, one layer in memory at a time.

Layer by layer each model's hidden states are moved on and compared with the reference's; at the end the output matrices
pass by in blocks of ids and each window's distributions are compared. The arithmetic is float32 on every backend and
packed weights are unpacked first, so that the numbers are about the weights and not about how activations are rounded
(bfloat16 activations alone would show a KL of their own) or about a kernel.

Does not: load tokenizers, average over positions, or write anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwq_mlx.errors import OptionError
from qwq_mlx.model.device import small_cache
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.layers import LayerStream
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quality.divergence import Divergence, Positions
from qwq_mlx.quality.text import QualityText

__all__ = ["MeasureProgress", "Measured", "check_comparable", "measure"]

MeasureProgress = Callable[[int, int], None]
"""Called with the bytes of weights that are done and the bytes of all."""

_SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model against the reference.

    windows: Positions of each window. drift: after the embedding and after each layer, the mean over all positions of
    |hidden - reference's hidden| / |reference's hidden|.
    """

    windows: tuple[Positions, ...]
    drift: tuple[float, ...]


def check_comparable(reference: ModelFolder, model: ModelFolder) -> None:
    """Refuse two models whose hidden states or ids do not correspond. Raises OptionError naming what differs."""
    differing = [
        f"{name} is {getattr(model.config, name):,}, the reference has {getattr(reference.config, name):,}"
        for name in _SHAPE
        if getattr(model.config, name) != getattr(reference.config, name)
    ]
    if differing:
        raise OptionError(
            f"{model.path}: is another model than {reference.path}: {'; '.join(differing)}. "
            "Give conversions and checkpoints of one and the same model."
        )


def measure(
    reference: ModelFolder,
    models: Sequence[ModelFolder],
    text: QualityText,
    *,
    progress: MeasureProgress | None = None,
) -> tuple[Measured, ...]:
    """Run all on the text; one Measured for each of `models`, in their order.

    In memory: one layer of one model in float32, and hidden states of (1 + models) x positions x hidden float32.
    Raises OptionError for models that do not correspond, SourceError for a folder that changes meanwhile.
    """
    for model in models:
        check_comparable(reference, model)
    texts = [window.ids for window in text.windows]
    with small_cache():
        runs = [_Run(LayerStream(files, compute_type="float32", unpack=True), texts) for files in (reference, *models)]
        count = _Count(sum(run.stream.files.checkpoint.tensor_bytes for run in runs), progress)
        drift = [[_drift(runs[0], run) for run in runs[1:]]]
        for index in range(reference.config.num_hidden_layers):
            for run in runs:
                run.advance(index)
                count.add(run.stream.n_bytes(f"model.layers.{index}."))
            drift.append([_drift(runs[0], run) for run in runs[1:]])
        windows = _compare_heads(runs, text, count)
    return tuple(
        Measured(windows=tuple(each), drift=tuple(layer[place] for layer in drift))
        for place, each in enumerate(windows)
    )


class _Run:
    """One model under way. hidden: (positions, hidden) of each window."""

    def __init__(self, stream: LayerStream, texts: Sequence[Sequence[int]]) -> None:
        self.stream = stream
        self.hidden: list[Any] = [stream.embed(text) for text in texts]

    def advance(self, index: int) -> None:
        layer = self.stream.layer(index)
        for place, each in enumerate(self.hidden):
            self.hidden[place] = layer(each)


class _Count:
    def __init__(self, total_bytes: int, progress: MeasureProgress | None) -> None:
        self._total, self._done, self._progress = total_bytes, 0, progress

    def add(self, n_bytes: int) -> None:
        self._done = min(self._total, self._done + n_bytes)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _drift(reference: _Run, run: _Run) -> float:
    mx = import_mlx()
    errors = []
    for ours, theirs in zip(run.hidden, reference.hidden, strict=True):
        size = mx.maximum(mx.linalg.norm(theirs, axis=1), 1e-30)
        errors.append(np.array(mx.linalg.norm(ours - theirs, axis=1) / size).astype(np.float64))
    return float(np.concatenate(errors).mean())


def _compare_heads(runs: Sequence[_Run], text: QualityText, count: _Count) -> list[list[Positions]]:
    """Positions of each model and window; the position before an id is the one that predicts it."""
    heads = [run.stream.head() for run in runs]
    normed = [
        [
            head.norm(hidden[window.first - 1 : len(window.ids) - 1])
            for hidden, window in zip(run.hidden, text.windows, strict=True)
        ]
        for head, run in zip(heads, runs, strict=True)
    ]
    for run in runs:
        run.hidden.clear()
    divergences = [[Divergence(window.ids[window.first :]) for window in text.windows] for _ in runs[1:]]
    for blocks in zip(*(head.blocks() for head in heads), strict=True):
        for place in range(len(text.windows)):
            reference = blocks[0].logits(normed[0][place])
            for model, block in enumerate(blocks[1:]):
                divergences[model][place].add(block.first_id, reference, block.logits(normed[model + 1][place]))
        count.add(sum(block.n_bytes for block in blocks))
    return [[each.positions() for each in model] for model in divergences]
