"""Tokens a pass that a drafter would give on outputs of the target, teacher-forced: the target itself is not run.

A greedy draft behind right ids is the same whatever its length, so one pass of the drafter over an output gives its
drafts at every place. A pass of the target checks up to K of them, keeps those before the first wrong one, and adds its
own id.

Does not: train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.tune_draft.windows import Batch

__all__ = ["CHUNK", "LENGTHS", "Named", "TokensAPass", "head", "hidden_states", "n_passes", "named", "tokens_a_pass"]

LENGTHS = (1, 2, 3, 5, 8)
"""Drafts a pass that are reported."""

CHUNK = 1024
"""Places whose logits are alive at once."""


class Named(NamedTuple):
    """What a drafter names at the targets of a window: ids, how probable it finds each, and whether that is right."""

    ids: list[int]
    probabilities: list[float]
    is_right: list[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensAPass:
    """How well a drafter names what the target wrote.

    n_tokens: that were to be named. named: share of them that it names. by_length: drafts a pass -> tokens a pass.
    """

    n_tokens: int
    named: float
    by_length: dict[int, float]


def n_passes(is_right: Sequence[bool], length: int) -> int:
    """Passes that an output takes with drafts of so many ids.

    >>> n_passes([True, True, True, False, True], 2)
    3
    """
    place = n = 0
    while place < len(is_right):
        end = min(place + length, len(is_right))
        while place < end and is_right[place]:
            place += 1
        place += 1
        n += 1
    return n


def tokens_a_pass(
    module: Any, batches: Sequence[Batch], progress: Callable[[int], None] = lambda n: None
) -> TokensAPass:
    """Measure a drafter, mlx_lm's Qwen2. progress: told how many tokens were named so far."""
    parts: dict[int, list[tuple[int, list[bool]]]] = {}
    n_done = 0
    for batch in batches:
        for window, each in zip(batch.windows, named(module, batch), strict=True):
            parts.setdefault(window.example, []).append((window.start, each.is_right))
        n_done += len(batch.targets)
        progress(n_done)
    texts = [[right for _, part in sorted(of_example) for right in part] for of_example in parts.values()]
    by_length = {length: n_done / sum(n_passes(text, length) for text in texts) for length in LENGTHS}
    return TokensAPass(n_tokens=n_done, named=sum(map(sum, texts)) / n_done, by_length=by_length)


def named(module: Any, batch: Batch) -> Iterator[Named]:
    """What the drafter finds likeliest at the targets of each window."""
    hidden = hidden_states(module, mx.array(batch.ids)).reshape(-1, module.args.hidden_size)
    ids: list[int] = []
    probabilities: list[float] = []
    for first in range(0, len(batch.places), CHUNK):
        logits = head(module, hidden[mx.array(batch.places[first : first + CHUNK])]).astype(mx.float32)
        best = mx.argmax(logits, axis=-1)
        probability = mx.exp(logits.max(axis=-1) - mx.logsumexp(logits, axis=-1))
        mx.eval(best, probability)
        ids.extend(best.tolist())  # type: ignore[arg-type]
        probabilities.extend(probability.tolist())  # type: ignore[arg-type]
    is_right = (np.array(ids) == batch.targets).tolist()
    ends = np.cumsum([len(window.targets) for window in batch.windows]).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        yield Named(ids[start:end], probabilities[start:end], is_right[start:end])


def hidden_states(module: Any, ids: Any, recomputed: Callable[[Any, Callable[..., Any]], Any] | None = None) -> Any:
    """What a Qwen2 gives its output matrix, (texts, n, hidden).

    recomputed: `training.recomputed`, where a gradient is taken and the memory of all layers is not to be held at once.
    """
    hidden = module.model.embed_tokens(ids)
    for layer in module.model.layers:
        attend = functools.partial(layer, mask="causal")
        hidden = (attend if recomputed is None else recomputed(layer, attend))(hidden)
    return module.model.norm(hidden)


def head(module: Any, hidden: Any) -> Any:
    """Logits of hidden states."""
    return module.model.embed_tokens.as_linear(hidden) if module.args.tie_word_embeddings else module.lm_head(hidden)
