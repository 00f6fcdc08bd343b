"""Penalties and biases equal plain twins, transformers and mlx-lm, and mlx-lm's own processors stand in our list."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.engine.logits_processors import Incremental
from qwq_mlx.engine.logits_processors.penalties import CountPenalty, LogitBias, RepetitionPenalty
from qwq_mlx.errors import OptionError
from qwq_mlx.model.upstream import import_mlx_lm

N_IDS = 40
PROMPT, OUTPUT = [3, 3, 7], [5, 7, 5, 5]


def applied(processor: Any, logits: np.ndarray, n_known: int) -> np.ndarray:
    """After a start with n_known of the output, and the rest token by token as a run would feed it."""
    if isinstance(processor, Incremental):
        processor.start(PROMPT, OUTPUT[:n_known])
    for n in range(n_known, len(OUTPUT) + 1):
        result = processor(mx.array([*PROMPT, *OUTPUT[:n]], mx.uint32), mx.array(logits)[None])
    assert result.shape == (1, N_IDS) and result.dtype == mx.float32
    return np.array(result[0])


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(8).normal(0, 2, N_IDS).astype(np.float32)


@pytest.mark.parametrize("n_known", range(len(OUTPUT) + 1))
def test_the_repetition_penalty_is_that_of_transformers_and_of_mlx_lm(logits: np.ndarray, n_known: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([PROMPT + OUTPUT]), torch.tensor(logits)[None])[0]
    ours = applied(RepetitionPenalty(1.3, n_ids=N_IDS), logits, n_known)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    make = import_mlx_lm("mlx_lm.sample_utils").make_repetition_penalty
    np.testing.assert_allclose(ours, applied(make(1.3), logits, n_known), rtol=1e-6)


@pytest.mark.parametrize("n_known", range(len(OUTPUT) + 1))
@pytest.mark.parametrize(("presence", "frequency"), [(0.5, -0.25), (0.0, 0.3), (-0.4, 0.0)])
def test_presence_and_frequency_penalties_count_the_output_alone(
    logits: np.ndarray, n_known: int, presence: float, frequency: float
) -> None:
    expected = logits.copy()
    for token_id in set(OUTPUT):
        expected[token_id] -= presence + frequency * OUTPUT.count(token_id)
    ours = applied(CountPenalty(presence=presence, frequency=frequency, n_ids=N_IDS), logits, n_known)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_processor_that_went_back_knows_only_what_is_left(logits: np.ndarray) -> None:
    processor = CountPenalty(presence=0.0, frequency=1.0, n_ids=N_IDS)
    applied(processor, logits, 0)
    processor.start(PROMPT, OUTPUT[:1])
    result = np.array(processor(mx.array([*PROMPT, OUTPUT[0], 9], mx.uint32), mx.array(logits)[None])[0])
    expected = logits.copy()
    expected[[OUTPUT[0], 9]] -= 1.0
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_logit_bias_is_added_and_minus_infinity_bans() -> None:
    bias = LogitBias({2: 1.5, 4: float("-inf")}, n_ids=6)
    changed = np.array(bias(mx.array([0], mx.uint32), mx.zeros((1, 6)))[0])
    assert changed.tolist() == [0, 0, 1.5, 0, float("-inf"), 0]


def test_impossible_biases_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"logit_bias has the id 10, expected ids from 0 to 9, the tokenizer's last\."
    ):
        LogitBias({10: 1.0}, n_ids=10)
    with pytest.raises(OptionError, match="logit_bias bans every id"):
        LogitBias({0: float("-inf"), 1: float("-inf")}, n_ids=2)
    with pytest.raises(OptionError, match="logit_bias bans every id that the language guard allows"):
        LogitBias({0: float("-inf")}, n_ids=2, masked=[False, True])
