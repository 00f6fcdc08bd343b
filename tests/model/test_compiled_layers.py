"""Layers as compiled graphs beside mlx_lm's own on the same arrays: every bit of the logits."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from configs import SMALL

from qwq_mlx.bench.models import in_compute_type, random_module
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.model_runner import run_pass
from qwq_mlx.model.blas_threads import _blas
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.rope import Yarn

CONFIG = replace(SMALL, hidden_size=256, intermediate_size=128, vocab_size=32, max_position_embeddings=1024)
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MATRICES = (*_PARTS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# not one packing for all, as a recipe of mixed bits leaves them
PACKED = {
    f"model.layers.{layer}.{name}": Packing(bits=8 if name.endswith(("v_proj", "down_proj")) else 4, group_size=32)
    for layer in range(CONFIG.num_hidden_layers)
    for name in _MATRICES
}

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="fused multiply-adds round once")


def is_compiled(module: Any) -> bool:
    return all(type(layer).__name__ == "CompiledBlock" for layer in module.layers)


@pytest.fixture(scope="module", params=["packed", "floats"])
def modules(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Ours and mlx_lm's layers."""
    packed = PACKED if request.param == "packed" else {}
    ours = random_module(CONFIG, packed, "float32", seed=1)
    theirs = in_compute_type(ours, CONFIG, packed, "float32")
    assert is_compiled(ours) and not is_compiled(theirs)
    return ours, theirs


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_logits_have_the_bits_of_mlx_lms_layers(modules: tuple[Any, Any], kv_bits: int | None) -> None:
    """Prompts and injected ids at once, then steps; rows of several lengths; a row that feeds several ids."""
    caches = [[new_cache(module, kv_bits) for _ in range(3)] for module in modules]
    for prompt in ([3], [4, 5, 6, 7, 8], [9, 1]):
        for module, of_module in zip(modules, caches, strict=True):
            row = [3, 4, 9].index(prompt[0])
            mx.eval(run_pass(module, mx.array([prompt]), [of_module[row]], [len(prompt)], batches_from=None))
    for ids, n_each in (([[1], [2], [3]], [1, 1, 1]), ([[4]], [1]), ([[5], [6], [7], [8]], [1, 2, 1])):
        logits = [
            run_pass(module, mx.array(ids), of_module[: len(n_each)], n_each, batches_from=None)
            for module, of_module in zip(modules, caches, strict=True)
        ]
        assert mx.array_equal(*logits), f"{ids} of {n_each}"


def test_other_layers_stay_mlx_lms_own() -> None:
    """Positions that YaRN stretches, and another compute type."""
    assert not is_compiled(random_module(CONFIG, {}, "bfloat16", seed=1))
    stretched = replace(CONFIG, yarn=Yarn(factor=2.0, original_context=512))
    assert not is_compiled(random_module(stretched, PACKED, "float32", seed=1))


def test_many_rows_are_those_alone_up_to_rounding(modules: tuple[Any, Any]) -> None:
    """Nine rows in a batch, then seven of them, whose caches are their own again."""
    ours, theirs = modules
    prompts = [[(5 * row + place) % 32 for place in range(3 + row % 2)] for row in range(9)]
    alone, together = [new_cache(theirs) for _ in prompts], [new_cache(ours) for _ in prompts]
    for prompt, of_theirs, of_ours in zip(prompts, alone, together, strict=True):
        mx.eval(theirs(mx.array([prompt]), cache=of_theirs), ours(mx.array([prompt]), cache=of_ours))
    threads = [each.num_threads for each in _blas().lib_controllers]
    for n_rows in (9, 9, 7, 8):
        ids, n_each = [[3 * row] for row in range(n_rows)], [1] * n_rows
        logits = run_pass(ours, mx.array(ids), together[:n_rows], n_each, batches_from=MIN_BLAS_ROWS)[:, -1]
        for row in range(n_rows):
            expected = run_pass(theirs, mx.array([ids[row]]), [alone[row]], [1], batches_from=None)[0, -1]
            assert mx.abs(logits[row] - expected).max().item() < 1e-4 * mx.abs(expected).max().item()
        assert all((layer.batch is not None) == (n_rows >= MIN_BLAS_ROWS) for row in together[:7] for layer in row)
    assert threads == [each.num_threads for each in _blas().lib_controllers]


def test_gates_that_are_shut_are_no_warning() -> None:
    """As with massive activations: exp(-x) of their inputs is beyond float32."""
    ours = random_module(CONFIG, {}, "float32", seed=1)
    for layer in ours.layers:
        layer.mlp.gate_proj.weight = 1e4 * layer.mlp.gate_proj.weight
    theirs = in_compute_type(ours, CONFIG, {}, "float32")
    alone, together = ([new_cache(module) for _ in range(MIN_BLAS_ROWS)] for module in (theirs, ours))
    ids = [[row] for row in range(MIN_BLAS_ROWS)]
    logits = run_pass(ours, mx.array(ids), together, [1] * len(ids), batches_from=MIN_BLAS_ROWS)[:, -1]
    for row, cache in enumerate(alone):
        expected = run_pass(theirs, mx.array([ids[row]]), [cache], [1], batches_from=None)[0, -1]
        assert mx.abs(logits[row] - expected).max().item() < 1e-4 * mx.abs(expected).max().item()
