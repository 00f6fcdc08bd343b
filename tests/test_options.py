"""Options are checked when they are made, and what is unset comes from the model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwq_mlx.errors import OptionError
from qwq_mlx.options import NEUTRAL, Limits, Sampling, Thinking


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, r"temperature is -1, expected a number from 0 to 100\."),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "temperature is inf"),
        ("temperature", 10**400, "temperature is 1000"),  # too large for a float
        ("temperature", True, "temperature is True"),
        ("temperature", "0.7", "temperature is '0.7'"),
        ("top_p", 0, r"top_p is 0, expected a number above 0 up to 1\."),
        ("top_p", 1.5, "top_p is 1.5"),
        ("top_k", -1, r"top_k is -1, expected a whole number of at least 0\."),
        ("top_k", 10**20, r"top_k is 10+, expected a whole number from 0 to 2,147,483,64\d\."),
        ("top_k", 2.0, "top_k is 2.0"),
        ("min_p", 1.01, "min_p is 1.01"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0"),
        ("presence_penalty", math.nan, "presence_penalty is nan"),
        ("frequency_penalty", 101, "frequency_penalty is 101"),
        ("dry_multiplier", -0.1, "dry_multiplier is -0.1"),
        ("dry_base", 0.5, "dry_base is 0.5"),
        ("dry_allowed_length", 0, "dry_allowed_length is 0"),
        ("dry_range", -1, "dry_range is -1"),
        ("dry_breakers", "\n", "dry_breakers is '.n', expected a tuple of texts"),
        ("logit_bias", [1], r"logit_bias is \[1\], expected a mapping"),
        ("logit_bias", {-1: 0.0}, "logit_bias has the key -1, expected a token id"),
        ("logit_bias", {2**31: 0.0}, "logit_bias has the key 2147483648"),
        ("logit_bias", {"5": 0.0}, "logit_bias has the key '5'"),
        ("logit_bias", {5: math.nan}, r"logit_bias\[5\] is nan, expected a finite number"),
        ("logit_bias", {5: math.inf}, r"logit_bias\[5\] is inf"),
        ("logit_bias", {5: -(10**400)}, r"logit_bias\[5\] is -1000"),
        ("order", "vllm", "order is 'vllm', expected 'hf'"),
        ("seed", -1, "seed is -1, expected a whole number from 0 to"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("seed", True, "seed is True"),
    ],
)
def test_a_sampling_value_that_cannot_be_honoured_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is 0, expected a whole number of at least 1"),
        ("max_tokens", -5, "max_tokens is -5"),
        ("context", 1, "context is 1"),
        ("stop", "END", "stop is 'END', expected a tuple"),
        ("stop", ("",), "stop holds an empty text"),
        ("language_guard", "yes", "language_guard is 'yes', expected True or False"),
        ("banned", (5,), "banned is"),
        ("prefill_step", 0, "prefill_step is 0"),
    ],
)
def test_a_limit_that_cannot_be_honoured_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Limits(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("think_tokens", -1, "think_tokens is -1, expected a whole number of at least 0"),
        ("think_tokens", 1.5, "think_tokens is 1.5"),
        ("on_loop", "dance", "on_loop is 'dance', expected one of answer, stop, nudge, off"),
        ("answer_tokens", 0, "answer_tokens is 0, expected a whole number of at least 1"),
    ],
)
def test_a_budget_that_cannot_be_honoured_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Thinking(**{field: value})


def test_the_edges_are_allowed() -> None:
    Thinking(think_tokens=0, answer_tokens=1)
    Sampling(temperature=0, top_p=1.0, top_k=0, min_p=1, seed=2**64 - 1, logit_bias={3: -math.inf})
    Limits(max_tokens=1, context=2, stop=("a", "b"))


def test_unset_fields_come_from_the_model_and_then_from_the_neutral_values() -> None:
    model = Sampling(temperature=0.7, top_p=0.8, top_k=20)
    resolved = Sampling(top_k=5, seed=3).resolve(model)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.seed) == (0.7, 0.8, 5, 3)
    assert resolved.min_p == NEUTRAL.min_p
    assert resolved.repetition_penalty == NEUTRAL.repetition_penalty
    assert Sampling(temperature=0.0).resolve(model).is_greedy
