"""Draws of many rows whose logits numpy has, as on the CPU: their statistics beside float64, and beside MLX's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from qwq_mlx.engine.activation_taps import ActivationTaps
from qwq_mlx.engine.drawing import Place, draw_places
from qwq_mlx.engine.row import Pending, Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.options import NEUTRAL, Inspect, Sampling

pytestmark = pytest.mark.tiny


def drawn(logits: np.ndarray, *, has_entropy: bool, are_computed: bool) -> list[tuple[int, float, float]]:
    """Of each row its id, its log-probability and what stands beside it."""
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9).resolve(NEUTRAL)
    inspect = Inspect(entropy=has_entropy)
    rows = [Row(Sampler(sampling, seed=seed), cache=[], max_tokens=1, inspect=inspect) for seed in range(len(logits))]
    places = [Place(row, at, None, 0) for at, row in enumerate(rows)]
    taps = ActivationTaps(nn.Module())
    read = []
    for pending, _ in draw_places(places, mx.array(logits), taps=taps, are_computed=are_computed):
        assert isinstance(pending, Pending)
        ids, stats = pending.drawn.read()
        read.append((ids[pending.place], *stats[pending.place]))
    return read


@pytest.mark.parametrize("has_entropy", [True, False])
def test_many_rows_draw_the_same_ids_with_the_statistics_of_float64(has_entropy: bool) -> None:
    logits = (np.random.default_rng(3).standard_normal((9, 700)) * 4 + 40).astype(np.float32)
    by_numpy = drawn(logits, has_entropy=has_entropy, are_computed=True)
    assert [id_ for id_, *_ in by_numpy] == [
        id_ for id_, *_ in drawn(logits, has_entropy=has_entropy, are_computed=False)
    ]
    for row, (id_, logprob, second) in zip(logits.astype(np.float64), by_numpy, strict=True):
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(logprobs[id_], abs=1e-4)
        expected = -(np.exp(logprobs) * logprobs).sum() if has_entropy else row.sum()
        assert second == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("has_entropy", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_shows_in_its_row_alone(bad: float, has_entropy: bool) -> None:
    logits = np.random.default_rng(4).standard_normal((8, 300)).astype(np.float32)
    logits[5, 7] = bad
    finite = [np.isfinite(stats).all() for _, *stats in drawn(logits, has_entropy=has_entropy, are_computed=True)]
    assert finite == [row != 5 for row in range(8)]
