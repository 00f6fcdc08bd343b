"""The estimate that a plan shows: operations of both models over the measured rates, and bytes over the disk's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.products import linear_product
from qwq_mlx.quality import estimate
from qwq_mlx.quality.estimate import estimate_memory_bytes, estimate_s
from qwq_mlx.quality.measure import measure
from qwq_mlx.quality.text import QualityText, Window

TEXT = QualityText(
    name="", sha256="", windows=(Window(ids=tuple(range(100)), first=1), Window(ids=(1,) * 50, first=1)), n_left_out=0
)


def test_seconds_are_products_attention_and_bytes(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_model_folder(tiny_checkpoint).config
    monkeypatch.setattr(estimate, "_rates", lambda: (1e6, 1e5))
    matrices = 2 * 320 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 192 * 128)
    products, attention = 2 * matrices * 150, 4 * (100**2 + 50**2) * 128 * 2
    expected = 2 * (products / 1e6 + attention / 1e5) + 3.0
    assert estimate_s(
        config, [len(window.ids) for window in TEXT.windows], weights_bytes=3_000_000_000
    ) == pytest.approx(expected)


def test_measuring_needs_no_more_memory_than_estimated(tiny_checkpoint: Path) -> None:
    files = open_model_folder(tiny_checkpoint)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(files, [files], TEXT)
    in_use, estimated = mx.get_peak_memory() - before, estimate_memory_bytes(files.config, TEXT, bits={4})
    assert in_use + mx.get_cache_memory() <= estimated <= 8 * in_use


def test_rates_are_of_this_machine() -> None:
    product, attention = estimate._rates()
    assert 1e7 < product < 1e16
    assert 1e6 < attention < 1e16


def test_the_product_that_is_timed_is_a_layers() -> None:
    x, weight = np.arange(6, dtype="f4").reshape(2, 3), np.arange(12, dtype="f4").reshape(4, 3)
    np.testing.assert_allclose(np.array(linear_product(mx.array(x), mx.array(weight))), x @ weight.T)
