"""The plan of batches and of a draft model, against what mlx-lm itself holds while it decodes so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.bench.models import qwq_shaped, random_module
from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.model.memory.plan import ModelShape, Workload, plan_memory, shape_of_facts
from qwq_mlx.model.upstream import import_mlx_lm

QWQ = shape_of_facts(QWQ_32B_PREVIEW)
SMALL = replace(
    qwq_shaped(6)[0],
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=300,
)
DRAFT = ModelShape(config=replace(SMALL, num_hidden_layers=2, intermediate_size=64), packed={})
N_TOKENS = 12


def ratio(workload: Workload, run: Callable[[Any], None], module: Any) -> float:
    """Planned by measured, beside the weights (of both models): those are exact, and would hide what is not."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(module)
    plan = plan_memory(ModelShape(config=SMALL, packed={}), workload, backend="cpu")
    weights_bytes = plan.weights_bytes
    if workload.draft is not None:
        weights_bytes += plan_memory(workload.draft, backend="cpu").weights_bytes
    return (plan.peak_bytes - weights_bytes) / (mx.get_peak_memory() - before)


@pytest.fixture(scope="module")
def module() -> Any:
    return random_module(SMALL, {}, "float32", seed=1)


def batch(module: Any, workload: Workload, apart: int) -> None:
    """apart: tokens between two ends."""
    generator = import_mlx_lm("mlx_lm.generate").BatchGenerator(module, prefill_step_size=workload.prefill_step)
    n_sequences = workload.n_sequences
    prompts = [[7] * ((workload.context or 0) - N_TOKENS)] * n_sequences
    generator.insert(prompts, [N_TOKENS - apart * index for index in range(n_sequences)])
    while responses := generator.next_generated():  # held while the next are made, as batch_generate does
        assert len(responses) <= n_sequences
    generator.close()


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("n_sequences", "context", "step", "apart"),
    [
        (2, 250, 64, 0),  # the last pass of both prompts binds
        (4, 250, 128, 0),
        (5, 250, 8, 2),  # the end of one sequence, while the caches of the others are full
        (2, 540, 64, 2),
        (5, 540, 64, 2),
    ],
)
def test_a_batch_holds_what_was_planned(module: Any, n_sequences: int, context: int, step: int, apart: int) -> None:
    workload = Workload(context=context, prefill_step=step, n_sequences=n_sequences)
    assert 0.97 < ratio(workload, lambda module: batch(module, workload, apart), module) < 1.05


@pytest.mark.tiny
def test_a_batch_that_ends_together_holds_less(module: Any) -> None:
    """The plan is for the worst end; this is what it costs where all end at once."""
    workload = Workload(context=540, prefill_step=64, n_sequences=4)
    assert 1.2 < ratio(workload, lambda module: batch(module, workload, 0), module) < 2


@pytest.mark.tiny
@pytest.mark.parametrize("n_draft", [1, 6])
@pytest.mark.parametrize(("context", "step"), [(250, 64), (600, 64), (600, 8)])
def test_a_draft_model_holds_what_was_planned(module: Any, n_draft: int, context: int, step: int) -> None:
    workload = Workload(context=context, prefill_step=step, draft=DRAFT, n_draft=n_draft)
    draft = random_module(DRAFT.config, {}, "float32", seed=2)

    def run(module: Any) -> None:
        steps = import_mlx_lm("mlx_lm.generate").speculative_generate_step(
            mx.array([7] * (context - N_TOKENS)),
            module,
            draft,
            num_draft_tokens=n_draft,
            max_tokens=N_TOKENS,
            prefill_step_size=step,
        )
        assert sum(1 for _ in steps) == N_TOKENS

    assert 0.97 < ratio(workload, run, module) < 1.05


def test_a_gpu_is_planned_with_every_layer_growing_at_once() -> None:
    """Its queue may hold them all; the CPU is through with one before the next."""
    alone = plan_memory(QWQ, backend="cuda")
    four = plan_memory(QWQ, Workload(n_sequences=4), backend="cuda")
    step = 256 * alone.kv_bytes_per_token
    assert four.peak_bytes > four.weights_bytes + 8 * four.kv_bytes - 4 * step + 4 * alone.prefill_bytes - 1
    assert four.peak_bytes == alone.peak_bytes + four.batch_bytes
    drafted = plan_memory(QWQ, Workload(draft=DRAFT, context=4096, compute_type="float32"))
    draft = plan_memory(DRAFT, Workload(context=4096, compute_type="float32"))
    plain = plan_memory(QWQ, Workload(context=4096, compute_type="float32"))
    assert drafted.speculative_bytes > draft.weights_bytes + draft.kv_bytes
    assert drafted.peak_bytes == plain.peak_bytes + drafted.speculative_bytes


def test_what_others_add_is_never_less_than_nothing_and_grows() -> None:
    for backend in ("cpu", "metal", "cuda"):
        for context in (1, 255, 256, 257, 4096, 32_768):
            batches = [
                plan_memory(QWQ, Workload(context=context, n_sequences=n), backend=backend).peak_bytes
                for n in (1, 2, 3, 8, 9, 100)
            ]
            drafts = [plan_memory(QWQ, Workload(context=context), backend=backend).peak_bytes] + [
                plan_memory(QWQ, Workload(context=context, draft=DRAFT, n_draft=n), backend=backend).peak_bytes
                for n in (1, 8, 64)
            ]
            assert batches == sorted(set(batches))
            assert drafts == sorted(drafts)
            assert drafts[0] < drafts[1]


def test_what_binds_and_the_arithmetic_name_the_batch_and_the_draft_model() -> None:
    lines = plan_memory(QWQ, Workload(n_sequences=3)).arithmetic().splitlines()
    assert lines[6].startswith("batch") and lines[6].endswith("bytes  3 sequences, as mlx-lm's batches hold them")
    lines = plan_memory(QWQ, Workload(draft=DRAFT)).arithmetic().splitlines()
    assert lines[6].startswith("speculative")
    assert lines[6].endswith("bytes  3 ids guessed by a draft model, as in mlx-lm")
    assert plan_memory(DRAFT, Workload(draft=QWQ)).binds == "speculative"
