"""The plan of rows side by side, and of a draft model as mlx-lm decodes with one, against what is held meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.bench.models import qwq_shaped, random_module
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import forked_cache, new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.errors import OptionError
from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.memory.plan import ModelShape, Workload, plan_memory, shape_of_facts
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import NEUTRAL, Sampling

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


def ratio(workload: Workload, run: Callable[[Any], None], module: Any, config: Qwen2Config = SMALL) -> float:
    """Planned by measured, beside the weights (of both models): those are exact, and would hide what is not.

    The plan is for the most that a pass holds, and beside other work MLX lets go sooner: the larger of two runs counts.
    """
    measured = max(_measured(run, module) for _ in range(2))
    plan = plan_memory(ModelShape(config=config, packed={}), workload, backend="cpu")
    weights_bytes = plan.weights_bytes
    if workload.draft is not None:
        weights_bytes += plan_memory(workload.draft, backend="cpu").weights_bytes
    return (plan.peak_bytes - weights_bytes) / measured


def _measured(run: Callable[[Any], None], module: Any) -> int:
    gc.collect()  # what earlier tests left would be freed meanwhile
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(module)
    return int(mx.get_peak_memory() - before)


@pytest.fixture(scope="module")
def module() -> Any:
    return random_module(SMALL, {}, "float32", seed=1)


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("n_sequences", "context", "step", "kv_bits"),
    [
        (2, 250, 64, None),
        (5, 130, 8, None),
        (3, 540, 64, None),
        (9, 270, 128, None),
        (16, 774, 64, None),
        (4, 540, 16, 4),
    ],
)
def test_rows_side_by_side_hold_what_was_planned(
    n_sequences: int, context: int, step: int, kv_bits: int | None
) -> None:
    wide = replace(SMALL, hidden_size=128, intermediate_size=192)  # heads of 64, which a quantized cache needs
    workload = Workload(context=context, prefill_step=step, n_sequences=n_sequences, kv_bits=kv_bits)

    def run(module: Any) -> None:
        decoder = Decoder(module, n_ids=wide.vocab_size)
        sampling = Sampling(temperature=1.0).resolve(NEUTRAL)
        rows = [
            Row(Sampler(sampling, seed=seed), cache=new_cache(module, kv_bits), max_tokens=N_TOKENS)
            for seed in range(n_sequences)
        ]
        for row in rows:
            for _ in decoder.prefill(row, [7] * (context - N_TOKENS), chunk=step):
                pass
        for _ in range(N_TOKENS):
            decoder.step(rows)

    assert 0.98 < ratio(workload, run, random_module(wide, {}, "float32", seed=1), wide) < 1.04


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("n_sequences", "context", "step", "kv_bits"),
    [(3, 540, 64, None), (9, 540, 64, None), (7, 1200, 32, 8), (16, 1200, 32, 8)],
)
def test_rows_behind_one_prompt_hold_what_was_planned(
    n_sequences: int, context: int, step: int, kv_bits: int | None
) -> None:
    wide = replace(SMALL, hidden_size=128, intermediate_size=192, max_position_embeddings=2048)
    n_prompt = context - N_TOKENS
    workload = Workload(
        context=context, prefill_step=step, n_sequences=n_sequences, kv_bits=kv_bits, n_shared=n_prompt - 1
    )

    def run(module: Any) -> None:
        decoder, sampling = Decoder(module, n_ids=wide.vocab_size), Sampling(temperature=1.0).resolve(NEUTRAL)
        first = Row(Sampler(sampling, seed=0), cache=new_cache(module, kv_bits))
        for _ in decoder.prefill(first, [7] * n_prompt, chunk=step):
            pass
        rows = []
        for seed in range(n_sequences):
            cache = forked_cache(module, first.cache, n_prompt - 1, kv_bits)
            rows.append(Row(Sampler(sampling, seed=seed), cache=cache, max_tokens=N_TOKENS))
            rows[-1].start([7] * n_prompt)
        for _ in range(N_TOKENS):
            decoder.step(rows)

    assert 0.98 < ratio(workload, run, random_module(wide, {}, "float32", seed=1), wide) < 1.08


def test_a_shared_prompt_makes_room_for_more_rows() -> None:
    """32 samples behind 8,000 positions of QwQ beside 32 prompts of their own."""
    asked = Workload(context=9000, n_sequences=32)
    for backend in ("cpu", "metal", "cuda"):
        own, shared = (plan_memory(QWQ, replace(asked, n_shared=n), backend=backend) for n in (0, 8000))
        saved = own.peak_bytes - shared.peak_bytes
        assert 0.9 * 31 * 8000 * own.kv_bytes_per_token < saved < 32 * 8000 * own.kv_bytes_per_token
    assert "32 sequences side by side, 8,000 positions of them shared" in shared.arithmetic()
    with pytest.raises(OptionError, match="n_shared is 9000, expected a whole number from 0 to below the context"):
        replace(asked, n_shared=9000)


@pytest.mark.tiny
@pytest.mark.parametrize("n_draft", [1, 6])
@pytest.mark.parametrize(("context", "step"), [(250, 64), (600, 64), (600, 32)])
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

    # wider than for single runs: a step of mlx-lm checks fewer rows than BLAS takes, a prefill more
    assert 0.95 < ratio(workload, run, module) < 1.1


def test_what_is_added_is_beside_what_one_sequence_needs() -> None:
    for backend in ("cpu", "metal", "cuda"):
        alone = plan_memory(QWQ, backend=backend)
        four = plan_memory(QWQ, Workload(n_sequences=4), backend=backend)
        assert four.peak_bytes >= four.weights_bytes + 4 * four.kv_bytes
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


def test_drafts_from_texts_have_their_logits_in_the_plan_where_prefill_does_not_cover_them() -> None:
    row = 8 * 4 * QWQ.config.vocab_size  # two copies of logits, and six that the sampler makes
    for n_sequences, step, more in ((1, 2048, 0), (8, 2048, 8 * 15 * row)):
        asked = Workload(n_sequences=n_sequences, prefill_step=step, n_draft=15, context=1024)
        plain, drafted = (plan_memory(QWQ, replace(asked, drafts_from_texts=each)) for each in (False, True))
        assert drafted.peak_bytes - plain.peak_bytes == drafted.speculative_bytes == more
        assert ("15 ids guessed from the texts so far" in drafted.arithmetic()) == bool(more)
    short = Workload(prefill_step=1, n_draft=15, drafts_from_texts=True)
    assert plan_memory(QWQ, short).speculative_bytes == 15 * row


def test_what_binds_and_the_arithmetic_name_the_batch_and_the_draft_model() -> None:
    lines = plan_memory(QWQ, Workload(n_sequences=3)).arithmetic().splitlines()
    assert lines[6].startswith("batch") and lines[6].endswith("bytes  3 sequences side by side")
    lines = plan_memory(QWQ, Workload(draft=DRAFT)).arithmetic().splitlines()
    assert lines[6].startswith("speculative")
    assert lines[6].endswith("bytes  3 ids guessed by a draft model, as in mlx-lm")
    assert plan_memory(DRAFT, Workload(draft=QWQ)).binds == "speculative"


def test_on_cuda_a_step_of_more_than_32_rows_holds_the_unpacked_output_matrix() -> None:
    """Of more rows alone, or of drafts that are checked with them; a tied one stays packed, and a layer is unpacked."""
    head, layer = 152_064 * 5120 * 2, 5120 * (2 * 128 * (40 + 8) + 3 * 27_648) * 2
    tied = replace(QWQ, config=replace(QWQ.config, tie_word_embeddings=True))

    def step(shape: ModelShape, n_sequences: int, **drafts: Any) -> int:
        workload = Workload(context=256, prefill_step=1, n_sequences=n_sequences, **drafts)
        plan = plan_memory(shape, workload, backend="cuda")
        return plan.peak_bytes - plan.weights_bytes - n_sequences * plan.kv_bytes

    drafts = {"drafts_from_texts": True, "n_draft": 15}
    for shape, unpacked in ((QWQ, head), (tied, layer)):
        assert step(shape, 33) - step(shape, 32) == step(shape, 32) - step(shape, 31) + unpacked
        of_two, of_three = (step(shape, n, **drafts) - step(shape, n) for n in (2, 3))
        assert of_three == of_two * 3 // 2 + unpacked
