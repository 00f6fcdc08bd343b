"""The token loops that are compared, ours and mlx-lm's, with the same prompt, cache content and sampling.

Ours also works out logprob and entropy of every id and refuses NaN, as every run does. The loops of one row are timed
by who runs them; those of several rows time their passes, each of which waits for the ids of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import forked_cache, new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.upstream import import_mlx, import_mlx_lm
from qwq_mlx.options import NEUTRAL, Limits, Sampling

__all__ = [
    "our_ids",
    "our_passes",
    "our_samples",
    "our_waits",
    "prompt_of",
    "sampling",
    "their_ids",
    "their_passes",
    "their_sampler",
    "their_waits",
]


def sampling() -> Sampling:
    """QwQ-32B-Preview's own values, whatever the folder says, so that every model does the same work."""
    return Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=0)


def prompt_of(n_prompt: int, n_ids: int) -> list[int]:
    """Some ids of a vocabulary."""
    return [(7 * place) % min(n_ids, 256) for place in range(n_prompt)]


def our_ids(
    module: Any, prompt: Sequence[int], n_ids: int, n_tokens: int, *, n_filled: int = 0, seed: int = 0
) -> Iterator[object]:
    """n_tokens by our decoder. n_filled: leading ids of the prompt whose place random keys and values take."""
    decoder, row = _our_row(module, prompt, n_ids, n_tokens, n_filled=n_filled, seed=seed)
    for _ in range(n_tokens):
        yield decoder.draw(row)


def _our_row(
    module: Any, prompt: Sequence[int], n_ids: int, n_tokens: int, *, n_filled: int = 0, seed: int = 0
) -> tuple[Decoder, Row]:
    """A decoder, and a row behind the prompt."""
    decoder = Decoder(module, n_ids=n_ids)
    cache = _filled_cache(module, n_filled)
    row = Row(Sampler(sampling().resolve(NEUTRAL), seed=seed), cache=cache, max_tokens=n_tokens)
    for _ in decoder.prefill(row, prompt, chunk=Limits().prefill_step, n_cached=n_filled):
        pass
    return decoder, row


def their_ids(module: Any, prompt: Sequence[int], n_tokens: int, *, n_filled: int = 0) -> Iterator[object]:
    """n_tokens by mlx-lm's generate_step."""
    step = import_mlx_lm("mlx_lm.generate").generate_step
    ids = import_mlx().array(list(prompt[n_filled:]))
    yield from step(
        ids,
        module,
        max_tokens=n_tokens,
        sampler=their_sampler(),
        prompt_cache=_filled_cache(module, n_filled),
        prefill_step_size=Limits().prefill_step,
    )


def our_passes(
    module: Any, prompt: Sequence[int], n_ids: int, n_passes: int, *, seeds: Sequence[int]
) -> tuple[list[list[int]], list[float]]:
    """Passes of one row for each seed: ids of each row, and seconds of each pass. Raises what a row fails with."""
    started = [_our_row(module, prompt, n_ids, n_passes + 1, seed=seed) for seed in seeds]
    decoder, rows = started[0][0], [row for _, row in started]
    seconds = []
    for _ in range(n_passes):
        start = time.perf_counter()
        _step(decoder, rows)
        seconds.append(time.perf_counter() - start)
    return [row.ids[row.n_prompt :] for row in rows], seconds


def our_samples(module: Any, prompt: Sequence[int], n_ids: int, n_tokens: int, n_rows: int) -> list[list[int]]:
    """n_tokens of each of some rows behind one prompt, which is fed once. Raises what a row fails with."""
    decoder, first = _our_row(module, prompt, n_ids, n_tokens)
    rows = [first]
    for seed in range(1, n_rows):
        sampler = Sampler(first.sampler.sampling, seed=seed)
        row = Row(sampler, cache=forked_cache(module, first.cache, len(prompt) - 1), max_tokens=n_tokens)
        row.start(prompt)
        rows.append(row)
    for _ in range(n_tokens):
        _step(decoder, rows)
    return [row.ids[row.n_prompt :] for row in rows]


def _step(decoder: Decoder, rows: Sequence[Row]) -> None:
    decoder.step(rows)
    for row in rows:
        if row.failure is not None:
            raise row.failure


def their_passes(module: Any, prompt: Sequence[int], n_passes: int, n_rows: int) -> list[float]:
    """The seconds of each pass of mlx-lm's BatchGenerator."""
    generator = import_mlx_lm("mlx_lm.generate").BatchGenerator(module, sampler=their_sampler())
    generator.insert([list(prompt)] * n_rows, [n_passes + 1] * n_rows)
    seconds = []
    start = time.perf_counter()
    while generator.next_generated():
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    generator.close()
    return seconds[:n_passes]


def our_waits(
    module: Any, newcomer: Sequence[int], n_ids: int, chunk: int, *, n_rows: int, n_alone: int
) -> tuple[list[float], list[float]]:
    """Seconds between two tokens of n_rows rows: in n_alone passes, and while a newcomer's prompt is fed in chunks."""
    n_tokens = 3 + n_alone + len(newcomer)
    started = [_our_row(module, prompt_of(16, n_ids), n_ids, n_tokens, seed=seed) for seed in range(n_rows)]
    decoder, rows = started[0][0], [row for _, row in started]
    alone, fed = [], list[float]()
    for _ in range(2):
        _step(decoder, rows)  # the first fills the pipeline
    latest = time.perf_counter()
    for _ in range(n_alone):
        _step(decoder, rows)
        latest, before = time.perf_counter(), latest
        alone.append(latest - before)
    if newcomer:
        entering = Row(rows[0].sampler, cache=new_cache(module), max_tokens=1)
        for _ in decoder.prefill(entering, newcomer, chunk=chunk):
            _step(decoder, rows)
            latest, before = time.perf_counter(), latest
            fed.append(latest - before)
    return alone, fed


def their_waits(module: Any, newcomer: Sequence[int], chunk: int, *, n_rows: int) -> list[float]:
    """The seconds between two tokens of n_rows rows of mlx-lm's BatchGenerator while it feeds a newcomer's prompt."""
    generator = import_mlx_lm("mlx_lm.generate").BatchGenerator(
        module, sampler=their_sampler(), prefill_step_size=chunk
    )
    n_tokens = 4 + len(newcomer)
    generator.insert([prompt_of(16, module.args.vocab_size)] * n_rows, [n_tokens] * n_rows)
    for _ in range(3):
        generator.next_generated()
    [entering] = generator.insert([list(newcomer)], [2])
    seconds, latest, has_entered = [], time.perf_counter(), False
    while not has_entered:
        has_entered = any(response.uid == entering for response in generator.next_generated())
        latest, before = time.perf_counter(), latest
        seconds.append(latest - before)
    generator.close()
    return seconds


def their_sampler() -> Any:
    """mlx-lm's with our values."""
    ours = sampling()
    make = import_mlx_lm("mlx_lm.sample_utils").make_sampler
    return make(temp=ours.temperature, top_p=ours.top_p, top_k=ours.top_k)


def _filled_cache(module: Any, n_filled: int) -> list[Any]:
    """A KV cache with random keys and values at so many positions, one layer after another."""
    mx = import_mlx()
    cache = new_cache(module)
    if n_filled:
        arguments = module.args
        width = arguments.hidden_size // arguments.num_attention_heads
        dtype = module.layers[0].input_layernorm.weight.dtype
        shape = (1, arguments.num_key_value_heads, n_filled, width)
        for layer in cache:
            layer.update_and_fetch(mx.random.normal(shape, dtype), mx.random.normal(shape, dtype))
            mx.eval(layer.state)
    return cache
