"""What a run is asked to show of every step, for research; nothing of it costs anything while it is not asked for.

Does not: compute any of it (`inspector` does), or change what is drawn, except through the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwq_mlx.errors import OptionError

__all__ = ["Inspect", "LogitsHook"]

LogitsHook = Callable[[int, Any, Any], Any]
"""hook(index, ids, logits) -> logits: index of the output id to be drawn, from 0; ids (n,) uint32, prompt and output so
far; logits (n_ids,) float32, the model's own. Both are mx.arrays that may not be computed yet: build on them, and the
next step stays under way while this one is read; read them (`.item()`), and every step waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """What every Step carries besides id, text, log-probability and entropy.

    top_k: the k likeliest ids in the model's own distribution, with their texts and log-probabilities; 0 is none. With
      it comes the margin, the log-probability of the likeliest id minus that of the second.
    hidden_layers: hidden states at the place that the id was drawn from, numbered as in transformers: 0 is the
      embedding, i what layer i - 1 gave, the number of layers what the head sees (after the final norm). Each is
      float32 (hidden_size,), 20 KiB a token and layer for QwQ-32B.
    loop_scores: how near the loop detector is to a report.
    entropy: work it out; without it a step is shorter (scripts/measure_step_check.py), and entropies are None.
    logits_hook: changes the logits before penalties and sampling. log-probability, entropy and alternatives stay those
      of the model; a step that is drawn again (a ban, a nudge) calls it again.
    """

    top_k: int = 0
    hidden_layers: tuple[int, ...] = ()
    loop_scores: bool = False
    entropy: bool = True
    logits_hook: LogitsHook | None = None

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k!r}, expected a whole number of at least 0; 0 is none.")
        layers: object = self.hidden_layers
        if not isinstance(layers, tuple) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise OptionError(f"hidden_layers is {layers!r}, expected a tuple of layer numbers, for example (0, 32).")
        if len(set(layers)) != len(layers):
            raise OptionError(f"hidden_layers is {layers!r}, expected each layer once.")
        for name in ("loop_scores", "entropy"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected True or False.")
        if self.logits_hook is not None and not callable(self.logits_hook):
            raise OptionError(f"logits_hook is {self.logits_hook!r}, expected a function (index, ids, logits).")

    def check(self, *, n_ids: int, n_layers: int, detects_loops: bool) -> None:
        """Refuse what this model and run cannot show. Raises OptionError."""
        if self.top_k > n_ids:
            raise OptionError(f"top_k is {self.top_k:,}, expected at most {n_ids:,}, the ids that the tokenizer has.")
        beyond = [layer for layer in self.hidden_layers if layer > n_layers]
        if beyond:
            raise OptionError(
                f"hidden_layers holds {beyond[0]}, expected numbers from 0 (the embedding) to {n_layers} (after the "
                "final norm)."
            )
        if self.loop_scores and not detects_loops:
            raise OptionError("loop_scores is True, but on_loop is 'off', so nothing looks for loops. Leave one out.")

    @property
    def is_off(self) -> bool:
        """Whether the device has nothing to do for it."""
        return not self.top_k and not self.hidden_layers and self.logits_hook is None
