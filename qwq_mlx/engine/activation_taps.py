"""The device's side of `Inspect`: alternatives, hidden states and the hook, as part of the step's own graph.

Hidden states come from taps: a shallow copy of the module whose embedding, layers and norm note what they return. The
arithmetic is the module's own, so ids are the same with and without; nothing is read until the step is.

Does not: know texts, or tap the prefill.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.options import Inspect

__all__ = ["Inspector", "Looking", "Seen"]


class Seen(NamedTuple):
    """What was asked for of one step, read. top: (id, log-probability) by falling log-probability; margin: None without
    top. hidden: layer -> (hidden_size,) float32."""

    top: tuple[tuple[int, float], ...]
    margin: float | None
    hidden: dict[int, Any]


class Looking(NamedTuple):
    """The same while the step is under way: arrays. total: logsumexp of what the hook returned."""

    ids: Any | None
    logprobs: Any | None
    hidden: dict[int, Any]
    total: Any | None

    def arrays(self) -> list[Any]:
        """All of them, to be computed with the step."""
        return [each for each in (self.ids, self.logprobs, self.total, *self.hidden.values()) if each is not None]


class Inspector:
    """Looks into the steps of one Decoder. module: what it runs in place of the one given."""

    def __init__(self, options: Inspect, module: Any, *, n_ids: int) -> None:
        self._options = options
        self._n_ids = n_ids
        self._notes: dict[int, Any] = {}
        self.module = _tapped(module, options.hidden_layers, self._notes) if options.hidden_layers else module
        self._total: Any | None = None

    def offered(self, logits: Any, before: Sequence[int], fed: Any, index: int) -> Any:
        """The logits to draw from: the model's, or what the hook makes of them. (n_ids,) float32.

        before: ids in the cache. fed: (1, n) those that this step feeds. Raises OptionError where the hook returns
        something else than logits.
        """
        hook = self._options.logits_hook
        if hook is None:
            return logits
        ids = fed.reshape(-1).astype(mx.uint32)
        if before:
            ids = mx.concatenate([mx.array(list(before), mx.uint32), ids])
        changed = hook(index, ids, logits)
        if not isinstance(changed, mx.array) or changed.shape != logits.shape:
            found = f"an array of shape {changed.shape}" if isinstance(changed, mx.array) else type(changed).__name__
            raise OptionError(
                f"logits_hook returned {found} at step {index:,}, expected an mx.array of shape ({self._n_ids},)."
            )
        changed = changed.astype(mx.float32)
        self._total = mx.logsumexp(changed)
        return changed

    def look(self, logits: Any, log_total: Any) -> Looking:
        """What is to be seen of the step whose logits these are. log_total: their logsumexp."""
        ids = logprobs = None
        if self._options.top_k:
            n_taken = min(max(self._options.top_k, 2), self._n_ids)
            ids = mx.argpartition(-logits, n_taken - 1)[:n_taken]
            ids = ids[mx.argsort(-logits[ids])]
            logprobs = logits[ids] - log_total
        hidden = {layer: self._notes[layer][0, -1].astype(mx.float32) for layer in self._options.hidden_layers}
        self._notes.clear()
        total, self._total = self._total, None
        return Looking(ids, logprobs, hidden, total)

    def read(self, looking: Looking, index: int) -> Seen:
        """Wait for the arrays. Raises GenerationError where the hook left nothing to draw, or NaN."""
        if looking.total is not None and not math.isfinite(looking.total.item()):
            raise GenerationError(
                f"Step {index:,}: logits_hook returned NaN, +infinity, or -infinity for every id. "
                "Return finite logits; -infinity bans an id."
            )
        top: tuple[tuple[int, float], ...] = ()
        margin = None
        if looking.ids is not None and looking.logprobs is not None:
            logprobs = [min(value, 0.0) for value in looking.logprobs.tolist()]  # as in decode: rounding
            pairs = list(zip(looking.ids.tolist(), logprobs, strict=True))
            margin = pairs[0][1] - pairs[1][1] if len(pairs) > 1 else math.inf
            top = tuple(pairs[: self._options.top_k])
        return Seen(top, margin, {layer: np.array(each) for layer, each in looking.hidden.items()})


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
