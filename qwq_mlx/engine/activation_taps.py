"""The device's side of `Inspect`: alternatives and hidden states, as part of the step's own graph.

Hidden states come from taps: a shallow copy of the module whose embedding, layers and norm note what they return. The
arithmetic is the module's own, so ids are the same with and without; nothing is read until the step is.

Does not: know texts, or tap the prefill.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.errors import GenerationError
from qwq_mlx.options import Inspect

__all__ = ["ActivationTaps", "Looking", "Seen", "look"]


class Seen(NamedTuple):
    """What was asked for of one step, read. top: (id, log-probability) by falling log-probability; margin: None without
    top. hidden: layer -> (hidden_size,) float32."""

    top: tuple[tuple[int, float], ...]
    margin: float | None
    hidden: dict[int, Any]


class Looking(NamedTuple):
    """The same while the step is under way: arrays. total: logsumexp of what the hooks returned."""

    ids: Any | None
    logprobs: Any | None
    hidden: dict[int, Any]
    total: Any | None

    def arrays(self) -> list[Any]:
        """All of them, to be computed with the step."""
        return [each for each in (self.ids, self.logprobs, self.total, *self.hidden.values()) if each is not None]

    def read(self, options: Inspect, index: int) -> Seen:
        """Wait for the arrays. Raises GenerationError where the hooks left nothing to draw, or NaN."""
        if self.total is not None and not math.isfinite(self.total.item()):
            raise GenerationError(
                f"Step {index:,}: a logits processor returned NaN, +infinity, or -infinity for every id. "
                "Return finite logits; -infinity bans an id."
            )
        top: tuple[tuple[int, float], ...] = ()
        margin = None
        if self.ids is not None and self.logprobs is not None:
            logprobs = [min(value, 0.0) for value in self.logprobs.tolist()]  # as in the decoder: rounding
            pairs = list(zip(self.ids.tolist(), logprobs, strict=True))
            margin = pairs[0][1] - pairs[1][1] if len(pairs) > 1 else math.inf
            top = tuple(pairs[: options.top_k])
        return Seen(top, margin, {layer: np.array(each) for layer, each in self.hidden.items()})


def look(options: Inspect, logits: Any, log_total: Any, hidden: Mapping[int, Any], total: Any | None) -> Looking | None:
    """What is to be seen of a step; None where nothing is.

    logits: (n_ids,) float32. log_total: their logsumexp. hidden: layer -> (hidden_size,) float32. total: see `Looking`.
    """
    ids = logprobs = None
    if options.top_k:
        n_taken = min(max(options.top_k, 2), logits.size)
        ids = mx.argpartition(-logits, n_taken - 1)[:n_taken]
        ids = ids[mx.argsort(-logits[ids])]
        logprobs = logits[ids] - log_total
    if ids is None and not hidden and total is None:
        return None
    return Looking(ids, logprobs, dict(hidden), total)


class ActivationTaps:
    """A model with taps at the layers that a pass is asked for; the copies are shallow and kept by their layers."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._outputs: dict[int, Any] = {}
        self._tapped: dict[frozenset[int], Any] = {frozenset(): module}

    def module(self, layers: Collection[int]) -> Any:
        """What to run in place of the model, so that `hidden` knows these layers."""
        key = frozenset(layers)
        if key not in self._tapped:
            self._tapped[key] = _tapped(self._module, sorted(key), self._outputs)
        return self._tapped[key]

    def hidden(self, layer: int, place: int) -> Any:
        """A layer's output at the last id of row `place` of the pass: (hidden_size,) float32, unread."""
        return self._outputs[layer][place, -1].astype(mx.float32)

    def clear(self) -> None:
        """Forget the pass."""
        self._outputs.clear()


class _Tap:
    """Calls what it stands for and notes the result."""

    def __init__(self, inner: Any, layer: int, notes: dict[int, Any]) -> None:
        self._inner = inner
        self._layer = layer
        self._notes = notes

    def __call__(self, *given: Any) -> Any:
        result = self._inner(*given)
        self._notes[self._layer] = result
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # as_linear of a tied embedding


def _tapped(module: Any, layers: Sequence[int], notes: dict[int, Any]) -> Any:
    """The module with taps in a copy of its two upper levels; weights are shared."""
    outer, inner = copy.copy(module), copy.copy(module.model)
    outer.model = inner
    blocks = list(inner.layers)
    for layer in layers:
        if layer == 0:
            inner.embed_tokens = _Tap(inner.embed_tokens, 0, notes)
        elif layer == len(blocks):
            inner.norm = _Tap(inner.norm, layer, notes)
        else:
            blocks[layer - 1] = _Tap(blocks[layer - 1], layer, notes)
    inner.layers = blocks
    return outer
