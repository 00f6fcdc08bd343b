"""Repetition, presence and frequency penalties, and a bias by id.

What was seen or counted is an array on the device that each drawn (still unread) id is put into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.logits_processors import Incremental
from qwq_mlx.errors import OptionError

__all__ = ["CountPenalty", "LogitBias", "RepetitionPenalty"]


class RepetitionPenalty(Incremental):
    """Divides positive logits of ids in prompt or output by `penalty`, and multiplies negative ones with it.

    Source: transformers' RepetitionPenaltyLogitsProcessor.
    """

    def __init__(self, penalty: float, *, n_ids: int) -> None:
        super().__init__()
        self._penalty = penalty
        self._seen = mx.zeros((n_ids,), mx.bool_)

    def _start(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._seen = mx.zeros(self._seen.size).at[mx.array([*prompt_ids, *output_ids], mx.int32)].add(1.0) > 0

    def _push(self, token: Any) -> None:
        self._seen = self._seen | (mx.arange(self._seen.size) == token)

    def _apply(self, logits: Any) -> Any:
        weaker = mx.where(logits < 0, logits * self._penalty, logits / self._penalty)
        return mx.where(self._seen, weaker, logits)


class CountPenalty(Incremental):
    """Takes `frequency` times an id's count in the output from its logit, and `presence` once where it came at all.

    Source: vLLM's presence and frequency penalties (those of OpenAI's API).
    """

    def __init__(self, *, presence: float, frequency: float, n_ids: int) -> None:
        super().__init__()
        self._presence = presence
        self._frequency = frequency
        self._counts = mx.zeros((n_ids,))

    def _start(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._counts = mx.zeros(self._counts.size)
        if output_ids:
            self._counts = self._counts.at[mx.array(list(output_ids))].add(1.0)

    def _push(self, token: Any) -> None:
        self._counts = self._counts.at[token].add(1.0)

    def _apply(self, logits: Any) -> Any:
        if self._frequency != 0.0:
            logits = logits - self._frequency * self._counts
        if self._presence != 0.0:
            logits = logits - self._presence * (self._counts > 0).astype(mx.float32)
        return logits


class LogitBias:
    """Adds a number to the logits of some ids; -inf bans an id.

    bias: id -> number. masked: ids that a language mask may forbid. Raises OptionError for an id beyond the
    vocabulary, or a bias that leaves nothing to draw.
    """

    def __init__(self, bias: Mapping[int, float], *, n_ids: int, masked: Sequence[bool] | None = None) -> None:
        beyond = sorted(token_id for token_id in bias if token_id >= n_ids)
        if beyond:
            raise OptionError(
                f"logit_bias has the id {beyond[0]:,}, expected ids from 0 to {n_ids - 1:,}, the tokenizer's last."
            )
        values = [0.0] * n_ids
        for token_id, value in bias.items():
            values[token_id] = float(value)
        if all(value == -math.inf or (masked is not None and masked[i]) for i, value in enumerate(values)):
            beside = "" if masked is None else " that the language guard allows"
            raise OptionError(f"logit_bias bans every id{beside}, so nothing could be drawn. Leave at least one.")
        self._bias = mx.array(values)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Logits, (1, n_ids) float32, with the bias added."""
        return logits + self._bias
