"""DRY on the device equals a plain search for repeats."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_mlx.engine.logits_processors.dry import DryPenalty, agreements
from qwq_mlx.options import NEUTRAL, Sampling

N_IDS = 6
BREAKER = 5


def plain_runs(ids: list[int], breakers: set[int]) -> list[int]:
    """For each earlier place, count back while the ids agree with the latest ones."""
    result = []
    for place in range(len(ids) - 1):
        length = 0
        while length <= place and ids[place - length] == ids[-1 - length] and ids[place - length] not in breakers:
            length += 1
        result.append(length)
    return [*result, 0] if ids else []


def plain_penalty(ids: list[int], chosen: Sampling) -> list[float]:
    result = [0.0] * N_IDS
    for place, length in enumerate(plain_runs(ids, {BREAKER})[:-1]):
        is_near = not chosen.dry_range or place + 1 >= len(ids) - chosen.dry_range
        if length >= chosen.dry_allowed_length and is_near:
            size = chosen.dry_multiplier * chosen.dry_base ** (length - chosen.dry_allowed_length)
            result[ids[place + 1]] = max(result[ids[place + 1]], size)
    return result


def taken(dry: DryPenalty, ids: list[int]) -> np.ndarray:
    """What the penalty takes from each logit behind these ids."""
    return -np.array(dry(mx.array(ids, mx.uint32), mx.zeros((1, N_IDS)))[0])


@given(ids=st.lists(st.integers(0, N_IDS - 1), max_size=40))
def test_agreements_count_back_from_the_latest_id(ids: list[int]) -> None:
    assert agreements(ids) == plain_runs(ids, set())


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, N_IDS - 1), min_size=2, max_size=30),
    cut=st.integers(0, 30),
    allowed=st.integers(1, 3),
    reach=st.sampled_from([0, 5, 12]),
)
def test_penalties_equal_the_plain_twin_at_once_and_id_by_id(
    ids: list[int], cut: int, allowed: int, reach: int
) -> None:
    chosen = Sampling(dry_multiplier=0.8, dry_allowed_length=allowed, dry_range=reach).resolve(NEUTRAL)
    dry = DryPenalty(chosen, n_ids=N_IDS, breaker_ids={BREAKER})
    dry.start(ids[:cut])
    for n in range(min(cut, len(ids)), len(ids) + 1):
        penalty = taken(dry, ids[:n])
    np.testing.assert_allclose(penalty, plain_penalty(ids, chosen), rtol=1e-5)


@pytest.mark.parametrize("n_before", [1023, 1024, 2050])
def test_the_record_grows_past_its_first_size(n_before: int) -> None:
    ids = (np.arange(n_before) % 5).tolist()
    chosen = Sampling(dry_multiplier=1e-20).resolve(NEUTRAL)
    dry = DryPenalty(chosen, n_ids=N_IDS, breaker_ids=())
    dry.start(ids)
    for token_id in (4, 3, 2, 1):
        ids.append(token_id)
        taken(dry, ids)
    assert dry._record[: dry._end].tolist() == ids
    assert dry._runs[: dry._end].tolist() == plain_runs(ids, set())


def test_a_very_long_repeat_stays_finite() -> None:
    chosen = Sampling(dry_multiplier=1.0, dry_base=100.0).resolve(NEUTRAL)
    dry = DryPenalty(chosen, n_ids=N_IDS, breaker_ids=())
    dry.start([1] * 900)
    penalty = taken(dry, [1] * 900)
    assert np.isfinite(penalty).all() and penalty[1] > 1e20 and penalty[0] == 0
