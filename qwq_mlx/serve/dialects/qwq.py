"""The package's own interface: runs that are watched token by token, with what the engine knows of each.

Does not: hold runs (`runs` does).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwq_mlx.options import Thinking
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields
from qwq_mlx.serve.dialects.fields import MAX_TOP_LOGPROBS, read_messages, sampling_of
from qwq_mlx.serve.dialects.openai import SAMPLING
from qwq_mlx.serve.jobs import Ask
from qwq_mlx.serve.settings import SERVED_LOOP_ACTIONS, Settings

__all__ = ["PATH", "read_fork", "read_resume", "read_run", "read_vote"]

PATH = "/api/qwq/runs"

_MAX_SAMPLES = 32


def read_run(body: dict[str, Any], *, settings: Settings, joins_thinking: bool) -> tuple[Ask, str]:
    """A body as an `Ask`, and the question as people read it. Raises ApiError."""
    fields = Fields(body)
    question = fields.text("question")
    if ("messages" in fields) == (question is not None):
        raise ApiError(400, "Expected either question or messages.", param="question")
    if question is not None:
        messages = [{"role": "user", "content": question}]
    else:
        messages = read_messages(fields, joins_thinking=joins_thinking)
    ask = Ask(
        messages=tuple(messages),
        sampling=sampling_of(fields, SAMPLING),
        max_tokens=fields.whole("max_tokens", 1),
        thinking=_thinking(fields, settings),
        top_logprobs=fields.whole("alternatives", 0, MAX_TOP_LOGPROBS),
        shows_steps=True,
    )
    fields.refuse_others()
    return ask, messages[-1]["content"]


def _thinking(fields: Fields, settings: Settings) -> Thinking:
    values: dict[str, Any] = {
        "think_tokens": fields.whole("think_tokens", 0),
        "answer_tokens": fields.whole("answer_tokens", 1),
        "on_loop": fields.choice("on_loop", SERVED_LOOP_ACTIONS),
    }
    return replace(settings.thinking, **{name: value for name, value in values.items() if value is not None})


def read_fork(body: dict[str, Any]) -> tuple[int, int | None]:
    """How many tokens are shared, and the seed; None draws one. Raises ApiError."""
    fields = Fields(body)
    at = fields.whole("at", 0)
    seed = fields.whole("seed", 0, 2**64 - 1)
    fields.refuse_others()
    if at is None:
        raise fields.wrong("at", "the number of tokens that are shared")
    return at, seed


def read_resume(body: dict[str, Any]) -> tuple[int | None, int | None, bool]:
    """max_tokens and context to go on with, None for what the run had, and whether to ask for the answer at once.

    Raises ApiError.
    """
    fields = Fields(body)
    max_tokens, context = fields.whole("max_tokens", 1), fields.whole("context", 1)
    answer_now = fields.flag("answer_now") or False
    fields.refuse_others()
    return max_tokens, context, answer_now


def read_vote(body: dict[str, Any]) -> tuple[int, int]:
    """How many samples, and how many tokens they share. Raises ApiError."""
    fields = Fields(body)
    n, at = fields.whole("n", 1, _MAX_SAMPLES), fields.whole("at", 0)
    fields.refuse_others()
    return n or 4, at or 0
