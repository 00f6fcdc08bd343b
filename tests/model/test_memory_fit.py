"""Whether a run fits is decided before a weight is read: refused with the arithmetic, capped, or forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.errors import FitError, OptionError
from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate import reasoner as rooms
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.memory.fit import fitted
from qwq_mlx.model.memory.plan import Workload, metal_limit_bytes, plan_memory, shape_of_facts
from qwq_mlx.model.split import tensor_split
from qwq_mlx.options import Limits

QWQ = shape_of_facts(QWQ_32B_PREVIEW)
GIB = 1 << 30


def on_mac(gib: int, **limits: Any) -> Any:
    return fitted(QWQ, Limits(**limits), limit_bytes=metal_limit_bytes(gib * GIB), backend="metal")


def test_what_fits_is_left_as_it_is() -> None:
    fit = on_mac(64)
    assert (fit.limits, fit.note) == (Limits(context=32_768), "")
    assert fit.plan.fits


def test_a_context_left_open_is_capped_to_the_largest_that_fits() -> None:
    fit = on_mac(32)
    largest = plan_memory(QWQ, limit_bytes=metal_limit_bytes(32 * GIB)).largest_context
    assert fit.limits.context == fit.plan.context == largest < 32_768
    assert fit.plan.fits
    assert f"capped to {largest:,} of 32,768 positions" in fit.note


def test_the_process_whose_memory_binds_is_named() -> None:
    with pytest.raises(FitError, match="does not fit the memory of process 1, which holds 1/2 of each layer"):
        fitted(
            QWQ,
            Limits(context=32_768),
            limit_bytes=64 << 30,
            backend="metal",
            split=tensor_split(QWQ.config, 2),
            of_ranks=[64 << 30, 8 << 30],
        )


def test_a_context_that_was_asked_for_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(FitError) as caught:
        on_mac(32, context=32_768)
    text = str(caught.value)
    assert "A context of 32,768 does not fit the memory of this machine" in text
    assert "weights       18.43 GB" in text
    assert "limit         22.91 GB     22,906,492,245 bytes  does not fit, metal" in text
    assert "The largest context that fits is 1" in text
    assert "The cheapest change: 4-bit cache, prefill passes of 256 ids" in text and "`force=True`" in text


def test_weights_that_do_not_fit_are_refused_whatever_the_context() -> None:
    with pytest.raises(FitError, match=r"largest context that fits is 0\. The cheapest change: none; take a model of"):
        on_mac(16)


def test_without_a_limit_everything_is_taken() -> None:
    fit = fitted(QWQ, Limits(context=32_768), limit_bytes=None, backend="metal")
    assert fit.limits.context == 32_768


def test_a_cache_is_quantized_by_the_plan_only_where_it_may_and_must() -> None:
    assert on_mac(32).limits.kv_bits is None, "never silently"
    assert on_mac(64, kv_bits="auto").limits.kv_bits is None
    fit = on_mac(32, kv_bits="auto")
    assert (fit.limits.kv_bits, fit.limits.prefill_step, fit.limits.context) == (4, 256, 32_768)
    assert "quantized to 4 bits" in fit.note
    limit = plan_memory(QWQ, Workload(kv_bits=8, prefill_step=256)).peak_bytes + 500_000_000
    assert fitted(QWQ, Limits(kv_bits="auto"), limit_bytes=limit, backend="metal").limits.kv_bits == 8


def test_a_context_beyond_the_models_is_wrong_usage() -> None:
    with pytest.raises(OptionError, match="context is 40,000, expected at most 32,768"):
        on_mac(64, context=40_000)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("qwq_mlx.generate.load_plan.load_model", read)


@pytest.mark.tiny
@pytest.mark.usefixtures("no_weights")
def test_load_refuses_before_a_weight_is_read(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwq_mlx.generate.load_plan.limit_bytes", lambda: 1_000_000)
    with pytest.raises(FitError, match="The cheapest change: none"):
        load(tiny_checkpoint)
    with pytest.raises(FitError, match="does not fit"):
        load(tiny_checkpoint, limits=Limits(kv_bits="auto"))  # heads of 32 cannot be quantized
    with pytest.raises(AssertionError, match="weights were read"):
        load(tiny_checkpoint, force=True)


def test_auto_bits_stay_plain_where_the_backend_cannot_multiply_by_a_quantized_cache() -> None:
    narrow = replace(QWQ, config=replace(QWQ.config, num_attention_heads=80))
    limit = metal_limit_bytes(32 * GIB)
    on_metal = fitted(narrow, Limits(kv_bits="auto"), limit_bytes=limit, backend="metal")
    on_cuda = fitted(narrow, Limits(kv_bits="auto"), limit_bytes=limit, backend="cuda")
    assert (on_metal.limits.kv_bits, on_cuda.limits.kv_bits) == (4, None)
    assert on_cuda.limits.context is not None and on_cuda.limits.context < 32_768
    with pytest.raises(FitError, match="The cheapest change: a context of"):
        fitted(narrow, Limits(context=32_768), limit_bytes=limit, backend="cuda")


@pytest.mark.tiny
@pytest.mark.usefixtures("no_weights")
def test_the_command_refuses_in_words_before_a_weight_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--context", "512", "--prefill-step", "64"]
    monkeypatch.setattr("qwq_mlx.generate.load_plan.limit_bytes", lambda: 1_000_000)
    assert command.main(given) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: A context of 512 does not fit" in err and "64 ids per pass" in err
    with pytest.raises(AssertionError, match="weights were read"):
        command.main([*given, "--force"])


@pytest.mark.tiny
def test_a_capped_run_says_so(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peak = plan_memory(tiny_checkpoint, Workload(context=64), backend="cpu").peak_bytes
    monkeypatch.setattr("qwq_mlx.generate.load_plan.limit_bytes", lambda: peak + 500_000_000)
    assert command.main(["-p", "x", "--model", str(tiny_checkpoint), "--max-tokens", "3"]) == 0
    _, err = capsys.readouterr()
    assert "the context is capped to " in err and " of 512 positions, more does not fit the memory" in err


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of width 64, which a quantized cache needs."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide"), n_heads=2, n_kv_heads=1)


@pytest.mark.tiny
@pytest.mark.parametrize("given", ["8", "4"])
def test_the_flag_for_kv_bits_reaches_the_cache(
    given: str, wide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    real: Callable[..., Any] = rooms.Stream.__init__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        seen.append(self.running.row.cache)

    monkeypatch.setattr(rooms.Stream, "__init__", noted)
    assert command.main(["-p", "x", "--model", str(wide), "--max-tokens", "3", "--kv-bits", given]) == 0
    assert [layer.bits for layer in seen[0]] == [int(given)] * 2
    capsys.readouterr()


@pytest.mark.tiny
def test_heads_that_cannot_be_quantized_are_refused_by_name(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["-p", "x", "--model", str(tiny_checkpoint), "--kv-bits", "8"]) == 2
    assert "--kv-bits is 8, but heads of width 32 are no multiple of the group 64" in capsys.readouterr().err
