"""The model is asked for its answer behind its finished text, where reading that text gives no sure one.

The answer cue and the beginning of a box go behind the text. The most likely ids up to the brace that closes the box
are the answer, and the product of their probabilities is its confidence. All of it happens in a fork that borrows the
run's KV cache and gives it back as it was, so it needs no second cache.

Does not: change the run, its ids or its text, or decide whether the answer counts (`finish` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.detokenizer import TextStream, decode
from qwq_mlx.engine.kv_cache import borrowed
from qwq_mlx.engine.row import Token
from qwq_mlx.generate.budget_forcing import box_ids
from qwq_mlx.generate.request import Request, new_row
from qwq_mlx.options import NEUTRAL, Inspect
from qwq_mlx.trace.trace import Asked

__all__ = ["MAX_ANSWER", "ask"]

MAX_ANSWER = 64
"""Ids that the asked answer may have, the closing brace included."""


def ask(
    request: Request,
    decoder: Decoder,
    cache: list[Any],
    ids: Sequence[int],
    *,
    after: str,
    is_closed: bool,
    is_stopped: Callable[[], bool],
) -> Asked:
    """Ask behind these output ids; the one that ended the text, if any, is left out.

    cache: the run's. It holds a beginning of prompt and ids, and does so again on return.
    after: the last two characters of the text.
    is_closed: whether a tag has closed the thinking.
    is_stopped: looked at before each id; ends the asking without an answer.

    Bans, biases of -inf and the caller's logits processors hold here too. What else bends the draw (temperature,
    penalties, the language mask) does not. In a full context the last ids make room, in the fork alone.
    Raises NotFiniteError, OptionError for what a logits processor returned, and what MLX raises.
    """
    text_ids = [*ids[:-1]] if ids and ids[-1] in request.model.stop_ids else [*ids]
    cue = box_ids(request.model.tokenizer, request.profile, after=after, is_closed=is_closed)
    cue_text, n_prompt = decode(request.pieces, cue), len(request.prompt_ids)
    room = request.context - n_prompt - len(cue) - MAX_ANSWER
    if room < 1:
        return _unanswered(
            cue_text,
            detail=f"no room to ask: the context is {request.context:,} tokens, and prompt, cue and answer take "
            f"{request.context - room + 1:,}",
        )
    text_ids = text_ids[:room]
    n_cached = n_prompt + len(text_ids) - 1
    if cache[0].offset < n_cached:
        return _unanswered(cue_text, detail="the run was cut before its ids were in the cache")
    with borrowed(cache, n_cached):
        row, bad_words = new_row(_greedy(request, max_tokens=len(text_ids) + len(cue) + MAX_ANSWER), cache)
        row.may_draft = False  # a draft model would have to read all of the text for a few ids
        row.start(request.prompt_ids, text_ids)
        decoder.force(row, cue)
        if bad_words is not None:
            bad_words.watch_from(row.n_output)
        stream, text, logprob, n_drawn = TextStream(request.pieces), "", 0.0, 0
        for token in _drawn(decoder, row, bad_words):
            n_drawn += 1
            if token.id in request.model.stop_ids:
                return _unanswered(cue_text, text, len(cue) + n_drawn, "the model ended its text in the box")
            logprob += token.logprob
            text += stream.feed(token.id)
            end = _box_end(text)
            if end is not None:
                return _answered(cue_text, text[:end], logprob, len(cue) + n_drawn)
            if is_stopped():
                return _unanswered(cue_text, text, len(cue) + n_drawn, "interrupted")
    return _unanswered(cue_text, text, len(cue) + n_drawn, f"the box was open after {MAX_ANSWER} tokens")


def _answered(cue: str, text: str, logprob: float, n_tokens: int) -> Asked:
    answer = text.removesuffix("}").strip()
    if not answer.strip(" .…?_"):
        return _unanswered(cue, text, n_tokens, "the box is empty")
    return Asked(cue=cue, text=text, n_tokens=n_tokens, answer=answer, confidence=round(math.exp(logprob), 3))


def _unanswered(cue: str, text: str = "", n_tokens: int = 0, detail: str = "") -> Asked:
    return Asked(cue=cue, text=text, n_tokens=n_tokens, answer=None, confidence=0.0, detail=detail)


def _greedy(request: Request, *, max_tokens: int) -> Request:
    bans = {token_id: bias for token_id, bias in request.sampling.logit_bias.items() if bias == -math.inf}
    return replace(
        request,
        sampling=replace(NEUTRAL, temperature=0.0, logit_bias=bans, seed=0),
        limits=replace(request.limits, language_guard=False, stop=(), max_tokens=max_tokens),
        inspect=Inspect(entropy=False),
    )


def _drawn(decoder: Decoder, row: Any, bad_words: Any) -> Iterator[Token]:
    """A row's tokens, as they are settled, until there are as many as there may be."""
    while not row.is_full:
        token = decoder.draw(row)
        if bad_words is None:
            yield token
            continue
        bad_words.feed(token)
        while bad_words.has_settled:
            yield bad_words.next()


def _box_end(text: str) -> int | None:
    """The place behind the brace that closes a box opened before this text; an escaped brace is none."""
    depth, is_escaped = 1, False
    for place, character in enumerate(text):
        if is_escaped or character == "\\":
            is_escaped = not is_escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place + 1
    return None
