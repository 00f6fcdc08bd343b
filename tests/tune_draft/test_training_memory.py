"""Layers that are computed again in the backward pass: the gradients, and what a step holds at once."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from configs import SMALL

from qwq_mlx.bench.models import random_module
from qwq_mlx.tune_draft import training
from qwq_mlx.tune_draft.memory import training_bytes
from qwq_mlx.tune_draft.settings import TuneSettings
from qwq_mlx.tune_draft.training import Trainer
from qwq_mlx.tune_draft.windows import Batch

CONFIG = replace(SMALL, hidden_size=256, intermediate_size=1024, vocab_size=500, tie_word_embeddings=True)
N_IDS = 256


def _trainer(n_layers: int, *, all_weights: bool = False) -> Trainer:
    config = replace(CONFIG, num_hidden_layers=n_layers)
    model: Any = SimpleNamespace(
        module=random_module(config, {}, "float32", seed=0), config=config, packed={}, compute_type="float32"
    )
    return Trainer(model, _settings(all_weights), n_steps=3)


def _settings(all_weights: bool) -> TuneSettings:
    return TuneSettings(all_weights=all_weights, batch_tokens=N_IDS, max_length=N_IDS)


def _batch() -> Batch:
    random = np.random.default_rng(0)
    ids = random.integers(0, CONFIG.vocab_size, (1, N_IDS)).astype(np.int32)
    places = np.arange(N_IDS - 1, dtype=np.int32)
    return Batch((), ids, places, random.integers(0, CONFIG.vocab_size, N_IDS - 1).astype(np.int32))


@pytest.mark.parametrize("all_weights", [False, True])
def test_gradients_are_those_of_layers_that_are_computed_once(
    all_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch()
    trained = []
    for _ in range(2):
        trainer = _trainer(2, all_weights=all_weights)
        losses = [trainer.step(batch) for _ in range(3)]
        trained.append((losses, trainer.state()))
        monkeypatch.setattr(training, "recomputed", lambda module, run: run)
    (losses, state), (once_losses, once) = trained
    assert losses == pytest.approx(once_losses, rel=1e-5) and losses[-1] < losses[0]
    assert all(mx.allclose(state[name], once[name], rtol=1e-2, atol=1e-6) for name in once)


def test_a_step_holds_what_one_layer_computes_however_many_there_are() -> None:
    batch, peaks, fixed = _batch(), [], []
    for n_layers in (2, 6):
        gc.collect()  # what others left in cycles would be let go meanwhile, and be counted off
        others = mx.get_active_memory()
        trainer = _trainer(n_layers)
        mx.eval(trainer.state())
        mx.reset_peak_memory()
        trainer.step(batch)
        trainer.step(batch)
        peaks.append(mx.get_peak_memory() - others)
        parts = training_bytes(replace(CONFIG, num_hidden_layers=n_layers), _settings(False), "cpu")
        fixed.append(parts["weights"] + parts["training"])
        assert 0.5 * sum(parts.values()) < peaks[-1] < sum(parts.values())
        del trainer
    grown = peaks[1] - peaks[0] - (fixed[1] - fixed[0])
    entering = 4 * N_IDS * CONFIG.hidden_size * 4  # what enters four more layers
    assert grown < 1.5 * entering, "else gradients of weights wait for those of all layers"
