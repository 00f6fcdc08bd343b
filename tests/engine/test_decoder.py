"""The pipelined loop draws what mlx-lm draws, and what one step at a time would draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import grow, layers_of, new_cache
from qwq_mlx.engine.logits_processors.dry import DryPenalty
from qwq_mlx.engine.logits_processors.penalties import CountPenalty, RepetitionPenalty
from qwq_mlx.engine.row import Drawn, Pending, Row, Token
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.model.load import LoadedModel, load_model
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import NEUTRAL, Inspect, Sampling

pytestmark = pytest.mark.tiny

PROMPT = [3, 77, 5, 200, 41, 7, 9, 260, 100, 31, 8]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


class Loop:
    """One row of one decoder."""

    def __init__(self, module: Any, row: Row, *, n_ids: int) -> None:
        self.decoder = Decoder(module, n_ids=n_ids)
        self.row = row

    def prefill(self, prompt: list[int], *, chunk: int = 4) -> list[int]:
        return list(self.decoder.prefill(self.row, prompt, chunk=chunk))

    def next(self) -> Token:
        return self.decoder.draw(self.row)


def processors(settings: dict[str, Any], n_ids: int) -> list[Any]:
    """Fresh processors of these settings; 9 is a breaker of repeats."""
    chosen = Sampling(**settings).resolve(NEUTRAL)
    made: list[Any] = []
    if chosen.repetition_penalty != 1.0:
        made.append(RepetitionPenalty(chosen.repetition_penalty or 1.0, n_ids=n_ids))
    if chosen.presence_penalty or chosen.frequency_penalty:
        presence, frequency = chosen.presence_penalty or 0.0, chosen.frequency_penalty or 0.0
        made.append(CountPenalty(presence=presence, frequency=frequency, n_ids=n_ids))
    if chosen.dry_multiplier:
        made.append(DryPenalty(chosen, n_ids=n_ids, breaker_ids=(9,)))
    return made


def loop(
    model: LoadedModel,
    *,
    seed: int = 0,
    chunk: int = 4,
    prompt: list[int] = PROMPT,
    max_tokens: int | None = None,
    **settings: Any,
) -> Loop:
    n_ids = model.tokenizer.n_ids
    sampler = Sampler(Sampling(**settings).resolve(NEUTRAL), seed=seed)
    made = processors(settings, n_ids)
    row = Row(sampler, cache=new_cache(model.module), processors=made, max_tokens=max_tokens)
    result = Loop(model.module, row, n_ids=n_ids)
    result.prefill(prompt, chunk=chunk)
    return result


def drawn_alone(model: LoadedModel, settings: dict[str, Any], seed: int, output: list[int], n_more: int) -> list[int]:
    """The output with n_more ids, drawn by a loop without cache whose processors begin anew at each step."""
    sampler = Sampler(Sampling(**settings).resolve(NEUTRAL), seed=seed)
    output = list(output)
    for _ in range(n_more):
        logits = mx.array(plain_logits(model, PROMPT + output))[None]
        tokens = mx.array(PROMPT + output, mx.uint32)
        for processor in processors(settings, model.tokenizer.n_ids):
            processor.start(PROMPT, output)
            logits = processor(tokens, logits)
        output.append(sampler.draw(logits[0], len(output)).item())
    return output


def plain_logits(model: LoadedModel, ids: list[int]) -> np.ndarray:
    return np.array(model.module(mx.array([ids]))[0, -1, : model.tokenizer.n_ids].astype(mx.float32))


@pytest.mark.parametrize("chunk", [1, 4, 2048])
@pytest.mark.parametrize("prompt", [[3], PROMPT])
def test_greedy_ids_are_those_of_mlx_lm_on_the_same_weights(model: LoadedModel, chunk: int, prompt: list[int]) -> None:
    generate_step = import_mlx_lm("mlx_lm.generate").generate_step
    theirs = [
        token if isinstance(token, int) else token.item()
        for token, _ in generate_step(mx.array(prompt), model.module, max_tokens=60, prefill_step_size=chunk)
    ]
    one = loop(model, temperature=0.0, chunk=chunk, prompt=prompt, max_tokens=60)
    assert [one.next().id for _ in range(60)] == theirs


def test_logprob_and_entropy_are_those_of_the_whole_forward(model: LoadedModel) -> None:
    one = loop(model, temperature=1.5)
    for _ in range(12):
        before = list(one.row.ids)
        token = one.next()
        logits = plain_logits(model, before).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        assert token.entropy == pytest.approx(-(np.exp(logprobs) * logprobs).sum(), abs=1e-4)


def test_a_certain_id_has_no_negative_entropy_and_no_probability_above_one(model: LoadedModel) -> None:
    """Rounding gave an entropy of -1.9e-6 on the pocket, whose steps are often certain."""
    one = loop(model, temperature=0.0, max_tokens=1)
    for entropy, logprob in ((-1.9e-6, 1.2e-7), (0.5, -0.1)):
        drawn = Drawn(mx.array([5], mx.uint32), mx.array([[logprob, entropy]]))
        one.row.pending = Pending(drawn, 0, None, None)
        token = one.next()
        assert token.entropy == pytest.approx(max(entropy, 0.0)) and token.logprob == pytest.approx(min(logprob, 0.0))
        one.row.rewind(0)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.0, "dry_multiplier": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_pipeline_draws_what_a_loop_without_cache_draws(model: LoadedModel, settings: dict[str, Any]) -> None:
    one = loop(model, seed=3, **settings)
    drawn = [one.next().id for _ in range(25)]
    assert drawn == drawn_alone(model, settings, 3, [], 25)
    assert one.row.ids == PROMPT + drawn and one.row.n_output == 25


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("is_last", [False, True])
def test_injected_ids_are_followed_as_if_they_had_been_drawn(
    model: LoadedModel, settings: dict[str, Any], is_last: bool
) -> None:
    one = loop(model, seed=5, max_tokens=7 if is_last else None, **settings)
    before = [one.next().id for _ in range(7)]
    one.row.max_tokens = None
    one.decoder.force(one.row, [11, 12, 13])
    after = [one.next().id for _ in range(10)]
    output = drawn_alone(model, settings, 5, [*before, 11, 12, 13], 10)
    assert output[10:] == after
    assert one.row.ids == PROMPT + output


@pytest.mark.parametrize("settings", SETTINGS)
def test_going_back_draws_the_same_ids_again(model: LoadedModel, settings: dict[str, Any]) -> None:
    one = loop(model, seed=5, **settings)
    first = [one.next().id for _ in range(20)]
    for place in (20, 9, 1, 0):
        one.row.rewind(place)
        assert [one.next().id for _ in range(20 - place)] == first[place:], place
        assert one.row.ids == PROMPT + first


def test_going_back_with_another_sampler_draws_others(model: LoadedModel) -> None:
    one = loop(model, seed=5, temperature=1.5)
    first = [one.next().id for _ in range(30)]
    one.row.rewind(10)
    one.row.sampler = one.row.sampler.other(one.row.sampler.sampling, salt=1)
    assert [one.next().id for _ in range(20)] != first[10:]


def test_padding_rows_of_the_embedding_are_never_drawn(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path / "padded", vocab_size=2048))
    assert model.tokenizer.n_ids < 400
    one = loop(model, temperature=100.0)
    assert max(one.next().id for _ in range(100)) < model.tokenizer.n_ids  # 85 in 100 would be padding


def test_a_prompt_goes_in_by_chunks_that_can_be_watched(model: LoadedModel) -> None:
    n_ids = model.tokenizer.n_ids
    one = Loop(model.module, Row(Sampler(NEUTRAL, seed=0), cache=new_cache(model.module)), n_ids=n_ids)
    assert one.prefill(PROMPT, chunk=4) == [4, 8, 10]
    assert one.row.cache[0].offset == 10


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", SETTINGS[::3])
def test_logits_that_are_not_finite_stop_the_run_at_their_step(
    model: LoadedModel, bad: float, settings: dict[str, Any], with_entropy: bool
) -> None:
    calls = 0

    def broken(ids: mx.array, cache: Any) -> mx.array:
        nonlocal calls
        logits = model.module(ids, cache=cache)
        calls += 1
        if calls == 5:
            logits[0, -1, 17] = bad
        return logits

    for name in ("layers", "model"):
        setattr(broken, name, getattr(model.module, name))
    n_ids = model.tokenizer.n_ids
    row = Row(
        Sampler(Sampling(**settings).resolve(NEUTRAL), seed=0),
        cache=new_cache(model.module),
        processors=processors(settings, n_ids),
        inspect=Inspect(entropy=with_entropy),
    )
    one = Loop(broken, row, n_ids=n_ids)
    one.prefill(PROMPT[:3], chunk=2)  # without logits
    with pytest.raises(GenerationError, match=r"Step 4: the model's logits hold NaN or infinity"):
        for _ in range(10):
            one.next()
    assert one.row.n_output == 4


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31, True, 1.0, "5"])
def test_ids_beyond_the_vocabulary_never_reach_the_device(model: LoadedModel, bad: Any) -> None:
    one = loop(model)
    with pytest.raises(OptionError, match=r"Place 1 holds the id .*, expected a whole number from 0 to"):
        one.prefill([1, bad])
    with pytest.raises(OptionError, match="Place 0 holds the id"):
        one.decoder.force(one.row, [bad])
    with pytest.raises(OptionError, match="There are no ids"):
        one.prefill([])
    with pytest.raises(OptionError, match="n_cached is 2, expected from 0 to 1"):
        list(one.decoder.prefill(one.row, [1, 2], chunk=4, n_cached=2))
    with pytest.raises(OptionError, match="Cannot go back to output id 1; there are 0"):
        one.row.rewind(1)


@pytest.fixture
def exact_buffers() -> Iterator[None]:
    """Without this MLX may lay a small array into a freed buffer of up to twice its size, and counts that."""
    old = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(old)


@pytest.mark.usefixtures("exact_buffers")
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_cache_grows_by_blocks_with_one_part_of_one_layer_held_twice(tmp_path: Path, kv_bits: Any) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path, n_layers=4, n_heads=2, n_kv_heads=1, n_shards=1))
    cache = new_cache(model.module, kv_bits)
    grow(cache, 5)
    assert cache[0].keys is None, "an empty cache is left to its first use"
    model.module(mx.array([PROMPT]), cache=cache)

    def held() -> list[dict[str, np.ndarray]]:
        return [{n: np.array(a) for n, a in layer.arrays.items()} for layer in layers_of(cache, len(PROMPT))]

    before = held()
    grow(cache, 256 - len(PROMPT))
    assert {layer.capacity for layer in layers_of(cache, 1)} == {256}
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    grow(cache, 257 - len(PROMPT))
    n_added, peak = mx.get_active_memory() - start, mx.get_peak_memory() - start
    assert {layer.capacity for layer in layers_of(cache, 1)} == {512}
    assert n_added == pytest.approx(sum(layer.nbytes for layer in cache) / 2, rel=0.1)  # small buffers are rounded up
    assert peak <= n_added * (1 + 1 / len(cache)), "the old keys, or values, of one layer beside the new"
    assert cache[0].offset == len(PROMPT)
    for old, new in zip(before, held(), strict=True):
        for name, array in old.items():
            np.testing.assert_array_equal(array, new[name], name)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_ids_over_a_growth_are_those_of_a_cache_that_mlx_lm_grows(tmp_path: Path, kv_bits: Any) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path, n_heads=2, n_kv_heads=1))
    generate_step = import_mlx_lm("mlx_lm.generate").generate_step
    prompt = [(7 * place) % 250 for place in range(250)]
    home = import_mlx_lm("mlx_lm.models.cache")
    quantized: dict[str, Any] = {}
    if kv_bits is not None:
        quantized["prompt_cache"] = [home.QuantizedKVCache(64, kv_bits) for _ in model.module.layers]
    theirs = [int(token) for token, _ in generate_step(mx.array(prompt), model.module, max_tokens=12, **quantized)]
    n_ids = model.tokenizer.n_ids
    sampler = Sampler(Sampling(temperature=0.0).resolve(NEUTRAL), seed=0)
    one = Loop(model.module, Row(sampler, cache=new_cache(model.module, kv_bits), max_tokens=12), n_ids=n_ids)
    one.prefill(prompt, chunk=100)
    assert [one.next().id for _ in range(12)] == theirs
