"""What may be drawn, with which probability, equals transformers' and mlx-lm's own code."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.engine.logits_processors.penalties import CountPenalty
from qwq_mlx.engine.sampler import Sampler, draw_rows, filtered, gumbel
from qwq_mlx.errors import OptionError
from qwq_mlx.options import NEUTRAL, Sampling

VOCABULARY = 152_064


def sampling(**changes: Any) -> Sampling:
    return Sampling(**changes).resolve(NEUTRAL)


def probabilities(logits: np.ndarray, chosen: Sampling) -> np.ndarray:
    """Ours as a vector over all ids."""
    ids, values = filtered(mx.array(logits), chosen)
    where = np.arange(logits.size) if ids is None else np.array(ids)
    result = np.zeros(logits.size)
    result[where] = np.array(mx.softmax(values))
    return result


def warped(logits: np.ndarray, chosen: Sampling) -> np.ndarray:
    """transformers' warpers, in its order."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits)[None]
    steps = [hf.TemperatureLogitsWarper(chosen.temperature)]
    steps += [hf.TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []
    steps += [hf.TopPLogitsWarper(chosen.top_p)] if chosen.top_p is not None and chosen.top_p < 1 else []
    steps += [hf.MinPLogitsWarper(chosen.min_p)] if chosen.min_p else []
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores[0].double(), -1).numpy()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 0.3, "top_k": 500, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.5},
    {"temperature": 0.9, "top_k": VOCABULARY + 5, "min_p": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_the_kept_set_and_its_probabilities_equal_transformers_at_the_full_vocabulary(
    settings: dict[str, Any], spread: float
) -> None:
    logits = np.random.default_rng(7).normal(0, spread, VOCABULARY).astype(np.float32)
    ours, theirs = probabilities(logits, sampling(**settings)), warped(logits, sampling(**settings))
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.999])
def test_top_p_alone_equals_transformers_up_to_the_rounding_of_the_running_sum(top_p: float) -> None:
    logits = np.random.default_rng(1).normal(0, 4, VOCABULARY).astype(np.float32)
    chosen = sampling(temperature=0.7, top_p=top_p)
    ours, theirs = probabilities(logits, chosen), warped(logits, chosen)
    full = np.sort(warped(logits, sampling(temperature=0.7)))
    # a sum of n float32 numbers up to 1 is off by at most n * 2**-24; far fewer ids than that lie at the border
    border = np.searchsorted(np.cumsum(full), 1 - top_p)
    differing = np.flatnonzero((ours > 0) != (theirs > 0))
    assert len(differing) <= max(2, (ours > 0).sum() // 100)
    assert all(abs(warped(logits, sampling(temperature=0.7))[i] - full[border]) < 1e-6 for i in differing)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_ids_that_tie_with_the_kth_are_kept_as_in_transformers() -> None:
    logits = np.round(np.random.default_rng(3).normal(0, 2, 5000), 1).astype(np.float32)
    chosen = sampling(temperature=0.7, top_k=20)
    assert (np.sort(logits)[-21:] == np.sort(logits)[-20]).sum() > 1
    assert np.array_equal(probabilities(logits, chosen) > 0, warped(logits, chosen) > 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 0.6, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 0.1, "top_p": 0.6},
    ],
)
def test_order_mlx_lm_keeps_what_mlx_lm_keeps(settings: dict[str, Any]) -> None:
    from qwq_mlx.model.upstream import import_mlx_lm

    theirs = import_mlx_lm("mlx_lm.sample_utils")
    logits = np.random.default_rng(5).normal(0, 3, 3001).astype(np.float32)
    x = mx.array(logits)[None]
    x = x - mx.logsumexp(x, keepdims=True)
    x = theirs.apply_top_p(x, settings["top_p"]) if "top_p" in settings else x
    x = theirs.apply_min_p(x, settings["min_p"], 1) if "min_p" in settings else x
    x = theirs.apply_top_k(x, settings["top_k"]) if "top_k" in settings else x
    expected = np.array(mx.softmax(x[0] / settings["temperature"]))
    ours = probabilities(logits, sampling(order="mlx-lm", **settings))
    assert np.array_equal(ours > 0, expected > 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-9)


def test_the_two_orders_keep_different_sets() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    one = probabilities(logits, sampling(temperature=0.1, top_p=0.6))
    other = probabilities(logits, sampling(temperature=0.1, top_p=0.6, order="mlx-lm"))
    assert [(one > 0).sum(), (other > 0).sum()] == [1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
        {"temperature": 1.7},
        {"temperature": 0.3, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 0.7, "order": "mlx-lm"},
    ],
)
@pytest.mark.parametrize("is_penalised", [False, True])
def test_draws_follow_the_probabilities_of_transformers(settings: dict[str, Any], is_penalised: bool) -> None:
    logits = np.random.default_rng(0).normal(0, 1.5, 50).astype(np.float32)
    if is_penalised:
        history = np.arange(0, 50, 3)
        processor = CountPenalty(presence=0.9, frequency=0.0, n_ids=50)
        processor.start([], history.tolist())
        logits = np.array(processor(mx.array(history, mx.uint32), mx.array(logits)[None])[0])
    chosen = sampling(**settings)
    expected = probabilities(logits, chosen) if chosen.order == "mlx-lm" else warped(logits, chosen)
    sampler, x = Sampler(chosen, seed=11), mx.array(logits)
    n_draws = 1500
    found = Counter(mx.stack([sampler.draw(x, index) for index in range(n_draws)]).tolist())
    assert set(found) <= set(np.flatnonzero(expected).tolist())
    possible = np.flatnonzero(expected)
    chi2 = sum((found[i] - n_draws * expected[i]) ** 2 / (n_draws * expected[i]) for i in possible.tolist())
    # mean df, variance 2 df: 6 sigma is about 1e-6 for these few degrees of freedom, and the seed is fixed
    df = len(possible) - 1
    assert chi2 < df + 6 * (2 * df) ** 0.5


def test_an_id_is_drawn_again_whatever_else_may_be_drawn() -> None:
    """Noise belongs to an id: what one setting draws, every other that keeps it and nothing likelier draws, too."""
    x = mx.array(np.random.default_rng(6).normal(0, 2, 400).astype(np.float32))
    wide = Sampler(sampling(temperature=1.0), seed=3)
    narrow = Sampler(sampling(temperature=1.0, top_k=20), seed=3)
    kept = set(np.argsort(np.array(x))[-20:].tolist())
    n_kept = 0
    for index in range(200):
        drawn = wide.draw(x, index).item()
        if drawn in kept:
            n_kept += 1
            assert narrow.draw(x, index).item() == drawn
    assert 60 < n_kept < 190
    shuffled = mx.array(np.random.default_rng(8).permutation(400).astype(np.uint32))
    key = mx.random.key(9)
    assert mx.array_equal(gumbel(key, shuffled), gumbel(key, mx.arange(400))[shuffled])


def test_the_noise_is_standard_gumbel() -> None:
    """Mean, variance and upper tail of 400,000 numbers, within 5 standard errors."""
    noise = np.array(gumbel(mx.random.key(1), mx.arange(400_000)), np.float64)
    n = noise.size
    assert abs(noise.mean() - np.euler_gamma) < 5 * (np.pi**2 / 6 / n) ** 0.5
    assert abs(noise.var() - np.pi**2 / 6) < 5 * (4.4 * (np.pi**2 / 6) ** 2 / n) ** 0.5
    for height in (2.0, 5.0, 8.0):
        share = -np.expm1(-np.exp(-height))
        assert abs((noise > height).mean() - share) < 5 * (share / n) ** 0.5


def test_a_draw_depends_on_seed_index_and_salt_alone() -> None:
    x = mx.array(np.random.default_rng(2).normal(0, 1, 300).astype(np.float32))

    def ids(seed: int, salt: int = 0, first: int = 0) -> list[int]:
        sampler = Sampler(sampling(temperature=1.0), seed=seed, salt=salt)
        return [sampler.draw(x, index).item() for index in range(first, first + 20)]

    assert ids(5) == ids(5)
    assert ids(5, first=10)[:10] == ids(5)[10:]
    assert len({tuple(ids(5)), tuple(ids(6)), tuple(ids(5, salt=1)), tuple(ids(2**40 + 5))}) == 4
    # neighbouring seeds must not be the same stream, shifted
    assert ids(6)[:19] != ids(5)[1:]
    before = mx.random.state[0].tolist()
    ids(5)
    assert mx.random.state[0].tolist() == before, "a draw must not touch MLX's global random state"


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-300, 5e-324])
def test_temperature_zero_and_tiny_take_the_likeliest(temperature: float) -> None:
    logits = np.random.default_rng(4).normal(0, 2, 400).astype(np.float32)
    sampler = Sampler(sampling(temperature=temperature, top_k=20, top_p=0.8), seed=0)
    drawn = {sampler.draw(mx.array(logits), i).item() for i in range(20)}
    assert drawn == {int(logits.argmax())}


def test_unresolved_samplings_are_refused() -> None:
    with pytest.raises(OptionError, match=r"still has a value of None; call resolve\(\) first"):
        filtered(mx.zeros(4), Sampling(temperature=1.0))


MIXED = (
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.95, "top_k": 20},
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.7, "min_p": 0.02, "order": "mlx-lm"},
    {"temperature": 1e-9, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 1.0},
)


@pytest.mark.parametrize("size", [300, 5_000])
def test_rows_are_drawn_together_as_alone(size: int) -> None:
    """Whatever kinds of samplings share a draw, in any order; the draw of one row is one of its own code before."""
    rng = np.random.default_rng(size)
    samplers = [Sampler(sampling(**MIXED[n % len(MIXED)]), seed=n, salt=n % 2) for n in range(16)]
    for _ in range(3):
        logits = mx.array(rng.normal(size=(16, size)) * 4, mx.float32)
        indices = rng.integers(0, 1000, 16).tolist()
        together = draw_rows(samplers, logits, indices)
        alone = [sampler.draw(row, index) for sampler, row, index in zip(samplers, logits, indices, strict=True)]
        assert (
            together.tolist()
            == mx.stack(alone).tolist()
            == [
                as_written_out(sampler, row, index)
                for sampler, row, index in zip(samplers, logits, indices, strict=True)
            ]
        )


def as_written_out(sampler: Sampler, logits: mx.array, index: int) -> int:
    """What the module's text says, one number after another."""
    if sampler.sampling.is_greedy:
        return int(np.argmax(np.array(logits)))
    ids, values = filtered(logits, sampler.sampling)
    key = mx.random.split(sampler.base_key + mx.array([0, index], mx.uint32), 1)[0]
    known = list(range(logits.size)) if ids is None else ids.tolist()
    kept = [(token_id, value) for token_id, value in zip(known, values.tolist(), strict=True) if value > -np.inf]
    noise = [gumbel(key, mx.array([token_id])).item() for token_id, _ in kept[-40:]]
    if len(kept) > 40:  # the likeliest stand last, or all are there; those would take too long one by one
        every = gumbel(key, mx.array([token_id for token_id, _ in kept]))
        assert every[-40:].tolist() == noise
        noise = every.tolist()
    best = max(zip(kept, noise, strict=True), key=lambda pair: np.float32(pair[0][1]) + np.float32(pair[1]))
    return best[0][0]


def test_a_draw_of_32_rows_takes_as_many_operations_as_one_of_8() -> None:
    """On a GPU each is a launch."""
    counts = {}
    for n in (8, 32):
        samplers = [Sampler(sampling(temperature=0.7, top_p=0.8, top_k=20), seed=each) for each in range(n)]
        logits = mx.zeros((n, 1_000))
        mx.eval(draw_rows(samplers, logits, [0] * n))  # what belongs to these rows is on the device now
        text = io.StringIO()
        mx.export_to_dot(text, draw_rows(samplers, logits, [1] * n))
        counts[n] = text.getvalue().count("shape=rectangle")
    assert counts[8] == counts[32] < 80
