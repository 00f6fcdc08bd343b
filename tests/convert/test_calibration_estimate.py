"""The seconds that a plan shows for a calibration, beside what the pass then costs a machine of known costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.convert.calibration import estimate, fit_layers
from qwq_mlx.convert.calibration.estimate import estimate_calibration_s
from qwq_mlx.convert.plan import Plan

COLUMN_S, CHANNEL_S = 2e-3, 5e-4


class SlowGpu:
    """A GPU on which only fits and factors take time. weight_s: of a weight, beside COLUMN_S of a column."""

    def __init__(self, weight_s: float) -> None:
        self.now, self.weight_s = 0.0, weight_s

    def fit(self, weights: Any, *given: Any) -> None:
        rows, columns = weights.shape
        self.now += columns * COLUMN_S + rows * columns * self.weight_s

    def factor(self, products: Any) -> None:
        self.now += sum(map(len, products)) * CHANNEL_S

    def time(self, run: Callable[[], object]) -> float:
        before = self.now
        run()
        return self.now - before

    def and_then(self, count: Callable[..., None], do: Callable[..., Any]) -> Callable[..., Any]:
        def both(*given: Any) -> Any:
            count(*given)
            return do(*given)

        return both


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowGpu]:
    machine = SlowGpu(request.param)
    for module in (estimate, fit_layers):
        monkeypatch.setattr(module, "backend_name", lambda: "cuda")
        monkeypatch.setattr(module, "DEVICE_WEIGHTS", 160 * 128)  # two parts of some matrices
    monkeypatch.setattr(estimate, "fit_rows_on_device", machine.fit)
    monkeypatch.setattr(estimate, "factor_on_device", machine.factor)
    monkeypatch.setattr(estimate, "best_time", machine.time)
    monkeypatch.setattr(estimate, "estimate_s", lambda *given, **named: 0.0)
    for name, count in (("fit_rows_on_device", machine.fit), ("factor_on_device", machine.factor)):
        monkeypatch.setattr(fit_layers, name, machine.and_then(count, getattr(fit_layers, name)))
    estimate._costs.cache_clear()
    yield machine
    estimate._costs.cache_clear()


@pytest.mark.parametrize(("gpu", "tie"), [(0.0, False), (1e-7, True)], indirect=["gpu"])
def test_columns_of_few_rows_and_factors_count_what_they_cost(tie: bool, gpu: SlowGpu, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tie=tie, n_layers=1)
    text = tmp_path / "text.txt"
    text.write_text("wait, is the answer 479? let me think again. " * 20, encoding="utf-8")
    plans: list[Plan] = []
    convert_checkpoint(source, tmp_path / "out", calibrate=text, quality=False, on_plan=plans.append)
    measured = gpu.now
    assert measured > 0
    assert estimate_calibration_s(plans[0]) == pytest.approx(measured)
