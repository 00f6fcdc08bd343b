"""What all dialects read alike: messages and their texts, sampling, how long to think, and the model's name.

Does not: write anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from qwq_mlx.errors import OptionError
from qwq_mlx.options import Sampling, Thinking
from qwq_mlx.serve.api_error import ApiError, not_built
from qwq_mlx.serve.body import Fields
from qwq_mlx.serve.settings import Settings

__all__ = [
    "EFFORTS",
    "MAX_STOPS",
    "MAX_TOP_LOGPROBS",
    "check_model",
    "read_messages",
    "sampling_of",
    "split_parts",
    "thinking_of",
]

EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1_024,
    "medium": 8_192,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Tokens of thinking by the words that clients have for it; None is no budget, 0 no thinking that is shown."""
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20

_RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
_MIN_OVERLAP, _MAX_OVERLAP = 8, 2_000  # characters; fewer agree by chance
_TEXT_PARTS = ("text", "input_text", "output_text")
_NEUTRAL_OF_MESSAGES = ("refusal", "audio", "annotations", "tool_calls", "function_call", "images", "name")


def check_model(named: str | None, name: str) -> None:
    """Raises ApiError for another model than the one there is; none named is that one."""
    if named is not None and named.removesuffix(":latest") != name:
        raise ApiError(
            404,
            f"The model {named[:200]!r} is not served here, expected {name!r}. No request makes this server load one.",
            param="model",
            code="model_not_found",
        )


def read_messages(fields: Fields, name: str = "messages", *, joins_thinking: bool = False) -> list[dict[str, str]]:
    """The conversation, in the words of `model.prompt`. A developer is the system.

    joins_thinking: put the thinking that a client sends back before the answer, as the model wrote both.
    """
    items = fields.items(name)
    if not items:
        raise ApiError(400, f"{name} is missing or empty, expected at least one message.", param=name)
    messages = []
    for place, item in enumerate(items):
        where = f"{name}[{place}]."
        inner = Fields(item, where)
        role = inner.choice("role", ("system", "developer", "user", "assistant"))
        if inner.choice("type", ("message",)) is None and role is None:
            raise ApiError(400, f"{where}role is missing, expected system, user or assistant.", param=where + "role")
        thought, content = split_parts(inner.raw("content"), where + "content")
        for each in ("reasoning_content", "reasoning", "thinking"):
            thought = inner.text(each) or thought
        inner.ignore("reasoning_details", "id", "status", "phase", "cache_control")
        for each in _NEUTRAL_OF_MESSAGES:
            inner.refuse_unless(each, ([], {}))
        inner.refuse_others()
        if joins_thinking and role == "assistant":
            content = _joined(thought, content)
        messages.append({"role": "system" if role == "developer" else str(role), "content": content})
    return messages


def _joined(thought: str, content: str) -> str:
    """A reply as it was written: the thinking and the answer, what a stream sent in both (`reply`) once."""
    if thought.endswith(content):
        return thought
    longest = min(len(thought), len(content), _MAX_OVERLAP)
    n_twice = next((n for n in range(longest, _MIN_OVERLAP - 1, -1) if thought.endswith(content[:n])), 0)
    return thought + content[n_twice:]


def split_parts(value: Any, where: str) -> tuple[str, str]:
    """The thinking and the text of a content: a text, or a list of parts; other parts than these are refused."""
    if value is None or isinstance(value, str):
        return "", value or ""
    if not isinstance(value, list):
        raise ApiError(400, f"{where} is no text and no list of parts.", param=where)
    thoughts, texts = [], []
    for place, item in enumerate(value):
        part = Fields(item, f"{where}[{place}].")
        kind = part.text("type")
        if kind in _TEXT_PARTS:
            texts.append(_part(part, "text"))
            for each in ("annotations", "citations", "logprobs"):
                part.refuse_unless(each, ([],))
            part.ignore("cache_control")
        elif kind == "thinking":
            thoughts.append(_part(part, "thinking"))
            part.ignore("signature", "cache_control")
        elif kind == "redacted_thinking":
            part.ignore("data")
        else:
            raise not_built(f"{where}[{place}].type", f"is {str(kind)[:80]!r}; this model reads text alone.")
        part.refuse_others()
    return "".join(thoughts), "".join(texts)


def _part(part: Fields, name: str) -> str:
    text = part.text(name)
    if text is None:
        raise part.wrong(name, "a text")
    return text


def sampling_of(fields: Fields, names: Iterable[str], *, seed: bool = True) -> Sampling:
    """Sampling from the fields that a dialect has of it, by the names of `options.Sampling` or Ollama's."""
    values: dict[str, Any] = {}
    for name in names:
        own_name = {"repeat_penalty": "repetition_penalty"}.get(name, name)
        values[own_name] = _top_k(fields) if name == "top_k" else fields.number(name, *_RANGES[own_name])
    if seed:
        number = fields.whole("seed", -1, 2**64 - 1)
        values["seed"] = None if number == -1 else number  # as Ollama: a random one
    try:
        return Sampling(**values)
    except OptionError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error


def _top_k(fields: Fields) -> int | None:
    top_k = fields.whole("top_k", -1)
    return 0 if top_k == -1 else top_k  # as vLLM: all


def thinking_of(settings: Settings, budget: int | None, *, is_wanted: bool = True) -> Thinking:
    """How long to think. budget: tokens that the client gives it, None for no word of it.

    is_wanted: False for a client that asks for no thinking, of which this model has no switch.
    """
    if not is_wanted:
        return replace(settings.thinking, think_tokens=0) if settings.no_think == "answer-now" else settings.thinking
    return settings.thinking if budget is None else replace(settings.thinking, think_tokens=budget)
