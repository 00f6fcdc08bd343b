"""Whole passes of a small model by the CUDA kernels, on a CPU by a C++ compiler, beside mlx_lm's layers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from configs import SMALL
from emulated_kernels import EmulatedKernels

from qwq_mlx.bench.models import in_compute_type, random_module
from qwq_mlx.engine.kv_cache import fork_cache, new_cache
from qwq_mlx.engine.model_runner import feed_prompt, run_pass
from qwq_mlx.model import rotations
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.kernels import decode_attention, few_row_matmul, layer_graphs, layers, tiling
from qwq_mlx.model.kernels.tiling import choose_tiling
from qwq_mlx.model.layout import Packing

CONFIG = replace(SMALL, hidden_size=512, intermediate_size=1024, vocab_size=64)
PACKED = {
    name.removesuffix(".weight"): Packing(bits=4, group_size=64)
    for name, shape in tensor_shapes(CONFIG).items()
    if len(shape) == 2
}
PROMPTS = [[7 * place % 60 for place in range(n)] for n in (1, 40, 60, 126)]  # the last has two chunks of positions


@pytest.fixture
def by_the_kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gate and up count as many rows, and the down projection as long."""
    monkeypatch.setattr(tiling, "_WIDE", CONFIG.intermediate_size)
    monkeypatch.setattr(tiling, "_LONG", CONFIG.intermediate_size)
    for module in (layers, rotations):
        monkeypatch.setattr(module, "cuda_kernels_run", lambda: True)
    EmulatedKernels(tmp_path_factory.mktemp("emulated")).put_in_place(monkeypatch)
    layer_graphs.layer_graphs.cache_clear()
    mx.disable_compile()  # the emulated kernels cannot be traced
    yield
    mx.enable_compile()
    for each in (choose_tiling, few_row_matmul._kernel, decode_attention._kernel, layer_graphs.layer_graphs):
        each.cache_clear()


def _caches(module: Any, prompts: list[list[int]]) -> list[Any]:
    caches = [new_cache(module) for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        feed_prompt(module, cache, prompt)
    return caches


@pytest.mark.usefixtures("by_the_kernels")
def test_rows_of_a_pass_get_the_logits_of_float32_and_the_bits_that_each_has_alone() -> None:
    ours = random_module(CONFIG, PACKED, "bfloat16", seed=3)
    theirs = in_compute_type(ours, CONFIG, PACKED, "float32")
    [packings] = {layers._packings_of(layer) for layer in ours.layers}
    assert packings is not None and packings.pair.wide_from == 5 and packings.down.n_slices == 2
    n_each, ids = [1, 1, 1, 3], mx.array([[9], [10], [11], [12], [13], [14]])
    together = run_pass(ours, ids, _caches(ours, PROMPTS), n_each, batches_from=1)
    assert together.shape == (6, 1, 64)
    for place, behind in ((0, []), (2, []), (5, [12, 13])):
        prompt = PROMPTS[min(place, 3)]
        [cache] = _caches(ours, [prompt])
        for each in behind:
            run_pass(ours, mx.array([[each]]), [cache], [1], batches_from=1)
        alone = run_pass(ours, ids[place : place + 1], [cache], [1], batches_from=1)
        assert mx.array_equal(together[place], alone[0])
        expected = theirs(mx.array([[*prompt, *behind, ids[place].item()]]))[0, -1]
        assert mx.abs(together[place, -1] - expected).max().item() < 0.03 * mx.abs(expected).max().item()


@pytest.mark.usefixtures("by_the_kernels")
def test_forks_attend_behind_what_they_share() -> None:
    ours = random_module(CONFIG, PACKED, "bfloat16", seed=3)
    theirs = in_compute_type(ours, CONFIG, PACKED, "float32")
    prompt = [7 * place % 60 for place in range(300)]
    [source] = _caches(ours, [prompt])
    forks = [fork_cache(ours, source, 300) for _ in range(2)]
    found = run_pass(ours, mx.array([[5], [6]]), forks, [1, 1], batches_from=1)
    assert forks[0][0].n_shared == 300
    for place, last in enumerate((5, 6)):
        expected = theirs(mx.array([[*prompt, last]]))[0, -1]
        assert mx.abs(found[place, -1] - expected).max().item() < 0.03 * mx.abs(expected).max().item()
