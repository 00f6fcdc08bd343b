"""Decode: tokens per second of one row, at the levels of ids and of text, beside what reading the bytes would allow.

"ids" is the loop alone, from logits to ids. "text" is what a user sees, ids to text (ours also splits thinking from
answer); it is measured behind an empty cache. Where mlx-lm would compute in another type than we do, a folder is also
run as mlx-lm loads it (bfloat16 throughout).

Does not: measure prefill or quality.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from qwq_mlx.bench.loops import our_ids, prompt_of, sampling, their_ids, their_sampler
from qwq_mlx.bench.subject import AS_LOADED, OURS, THEIRS, Bench, Row, Target
from qwq_mlx.bench.timing import decode_tok_s
from qwq_mlx.model.memory.sizes import kv_bytes_per_token
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import Limits

__all__ = ["QUESTION", "bench_decode", "byte_limit", "their_text"]

QUESTION = "Add one pair of parentheses to make the equation true: 1 + 2 * 3 + 4 * 5 + 6 * 7 + 8 * 9 = 479"
_N_PROMPT = 2  # behind what fills the cache; prefill is not timed, but waited for


def bench_decode(bench: Bench) -> list[Row]:
    """Every target at every context, and the folder's text."""
    rows = []
    for target in bench.targets:
        n_tokens = max(2, bench.options.n_tokens // target.share)
        for context in bench.options.contexts:
            if context + _N_PROMPT + n_tokens >= target.config.max_position_embeddings:
                bench.progress(f"{target.name}: context {context:,} is left out, it is beyond the model's own")
                continue
            rows.append(_ids_row(bench, target, context, n_tokens))
        if target.reasoner is not None:
            rows.append(_text_row(bench, target, n_tokens))
    return rows


def _ids_row(bench: Bench, target: Target, context: int, n_tokens: int) -> Row:
    prompt = prompt_of(context + _N_PROMPT, target.n_ids)
    asked = n_tokens + 1  # so that behind the last timed one the next pass is under way as behind the others

    def rate(tokens: Iterable[object]) -> float:
        return decode_tok_s(itertools.islice(tokens, n_tokens))

    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: rate(our_ids(target.module, prompt, target.n_ids, asked, n_filled=context)),
        THEIRS: lambda: rate(their_ids(target.theirs, prompt, asked, n_filled=context)),
    }
    if target.twin is not None:
        contestants[AS_LOADED] = lambda: rate(their_ids(target.twin, prompt, asked, n_filled=context))
    return Row(
        subject="decode",
        model=target.name,
        setting=f"ids, context {context:,}",
        unit="tok/s",
        runs=bench.turns(contestants, f"{target.name}, ids, context {context:,}"),
        byte_limit=byte_limit(target, bench.bandwidth, context),
    )


def _text_row(bench: Bench, target: Target, n_tokens: int) -> Row:
    limits = Limits(max_tokens=n_tokens)
    reasoner = target.reasoner
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: decode_tok_s(reasoner.stream(QUESTION, sampling=sampling(), limits=limits)),
        THEIRS: lambda: decode_tok_s(their_text(reasoner.model, target.theirs, n_tokens)),
    }
    if target.twin is not None:
        contestants[AS_LOADED] = lambda: decode_tok_s(their_text(reasoner.model, target.twin, n_tokens))
    return Row(
        subject="decode",
        model=target.name,
        setting="text",
        unit="tok/s",
        runs=bench.turns(contestants, f"{target.name}, text"),
        byte_limit=byte_limit(target, bench.bandwidth, 0),
    )


def their_text(model: Any, module: Any, n_tokens: int) -> Iterable[object]:
    """mlx-lm's stream of text for the question. model: whose tokenizer is used."""
    wrapper = import_mlx_lm("mlx_lm.tokenizer_utils").TokenizerWrapper(
        model.tokenizer.hf, eos_token_ids=sorted(model.stop_ids)
    )
    ids = prompt_ids(model.tokenizer, QUESTION, context=model.config.max_position_embeddings)
    stream = import_mlx_lm("mlx_lm.generate").stream_generate
    yield from stream(module, wrapper, ids, max_tokens=n_tokens, sampler=their_sampler())


def byte_limit(target: Target, bandwidth: float, context: int) -> float:
    """Tokens per second if each reads every weight but the embedding, and the cache, once. bandwidth: bytes/s.

    A model that fits the processor's own caches can exceed it.
    """
    from mlx.utils import tree_flatten

    arrays: list[tuple[str, Any]] = tree_flatten(target.module.parameters())
    is_tied = target.config.tie_word_embeddings
    n_weights: int = sum(
        array.nbytes for name, array in arrays if is_tied or not name.startswith("model.embed_tokens.")
    )
    float_bytes: int = target.module.layers[0].input_layernorm.weight.dtype.size
    return bandwidth / (n_weights + context * kv_bytes_per_token(target.config, None, float_bytes))
