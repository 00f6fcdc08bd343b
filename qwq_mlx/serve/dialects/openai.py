"""OpenAI's chat completions: the body that clients send, and what they read back, with the thinking beside the answer.

The thinking goes out under both names that clients look for, `reasoning_content` and `reasoning`, with the same text;
no client that was tried shows it twice.

Does not: call tools, read images, or keep a response.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any

from qwq_mlx.options import Sampling, Thinking
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields, dumped
from qwq_mlx.serve.dialects.errors import error_body
from qwq_mlx.serve.dialects.fields import (
    EFFORTS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    check_model,
    read_messages,
    sampling_of,
    thinking_of,
)
from qwq_mlx.serve.jobs import Ask, Delta, Ended, LogprobEntry
from qwq_mlx.serve.settings import ReasoningField, Settings

__all__ = [
    "PATH",
    "SAMPLING",
    "WITHOUT_EFFECT",
    "ChatWriter",
    "event_line",
    "read_chat",
    "read_logit_bias",
    "read_stream_options",
]

PATH = "/v1/chat/completions"

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# They name, bill or store a request, and change no token.
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "web_search_options": (),
    "keep_alive": (-1, "-1"),
}


def read_chat(
    body: dict[str, Any], *, settings: Settings, model: str, joins_thinking: bool
) -> tuple[Ask, ChatWriter, bool]:
    """A body as an `Ask`, what writes its answer, and whether it is streamed. Raises ApiError."""
    fields = Fields(body)
    check_model(fields.text("model"), model)
    messages = read_messages(fields, joins_thinking=joins_thinking)
    streams = fields.flag("stream") or False
    includes_usage = read_stream_options(fields)
    thinking, shows_thinking = _thinking(fields, settings)
    wants_logprobs = fields.flag("logprobs") or False
    top_logprobs = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top_logprobs and not wants_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    most = fields.whole("max_completion_tokens", 1)
    legacy = fields.whole("max_tokens", 1)
    ask = Ask(
        messages=tuple(messages),
        sampling=read_logit_bias(fields, sampling_of(fields, SAMPLING)),
        max_tokens=legacy if most is None else most,
        thinking=thinking,
        stop=fields.texts("stop", at_most=MAX_STOPS),
        n=fields.whole("n", 1, 64) or 1,
        top_logprobs=(top_logprobs or 0) if wants_logprobs else None,
    )
    fields.ignore(*WITHOUT_EFFECT)
    fields.refuse_others(_NEUTRAL)
    writer = ChatWriter(
        model,
        n_choices=ask.n,
        reasoning_field=settings.reasoning_field if shows_thinking else "none",
        includes_usage=includes_usage,
        has_logprobs=wants_logprobs,
    )
    return ask, writer, streams


def read_stream_options(fields: Fields) -> bool:
    """Whether a last chunk tells the usage."""
    options = fields.inner("stream_options")
    if options is None:
        return False
    includes_usage = options.flag("include_usage") or False
    options.ignore("include_obfuscation")
    options.refuse_others()
    return includes_usage


def read_logit_bias(fields: Fields, sampling: Sampling) -> Sampling:
    """The sampling with a bias by token id, of -100 to 100."""
    values = fields.raw("logit_bias")
    if values is None:
        return sampling
    inner = Fields(values, "logit_bias.")
    bias = {}
    for name in values:
        if not name.isdecimal() or len(name) > 9:
            raise ApiError(400, f"logit_bias has the key {name[:40]!r}, expected a token id.", param="logit_bias")
        bias[int(name)] = inner.number(name, -100, 100) or 0.0
    return replace(sampling, logit_bias=bias)


def _thinking(fields: Fields, settings: Settings) -> tuple[Thinking, bool]:
    """How long to think and whether the client sees it, from any of the fields that say so."""
    effort, budget, shows = fields.choice("reasoning_effort", tuple(EFFORTS)), None, True
    if (reasoning := fields.inner("reasoning")) is not None:
        effort = reasoning.choice("effort", tuple(EFFORTS)) or effort
        budget = reasoning.whole("max_tokens", 0)
        shows = not reasoning.flag("exclude")
        if reasoning.flag("enabled") is False:
            effort = "none"
        reasoning.refuse_others()
    if (thinking := fields.inner("thinking")) is not None:
        if thinking.choice("type", ("enabled", "disabled", "auto", "adaptive")) == "disabled":
            effort = "none"
        budget = thinking.whole("budget_tokens", 0) if budget is None else budget
        thinking.refuse_others()
    if (template := fields.inner("chat_template_kwargs")) is not None:
        if template.flag("enable_thinking") is False:
            effort = "none"
        template.refuse_others()
    if fields.flag("include_reasoning") is False:
        shows = False
    if effort == "none":
        return thinking_of(settings, None, is_wanted=False), False
    if budget is None and effort is not None:
        budget = EFFORTS[effort]
    return thinking_of(settings, budget), shows


def _usage(ended: list[Ended]) -> dict[str, Any]:
    """Tokens of all choices; a prompt that they share counts once."""
    n_prompt, n_cached = ended[0].usage.n_prompt, ended[0].usage.n_cached
    n_output = sum(each.usage.n_output for each in ended)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_output,
        "total_tokens": n_prompt + n_output,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": sum(each.usage.n_reasoning for each in ended)},
    }


def event_line(value: Any) -> bytes:
    """One server-sent event."""
    return f"data: {dumped(value)}\n\n".encode()


class ChatWriter:
    """Chunks of a stream, or one completion."""

    media_type = "text/event-stream"

    def __init__(
        self, model: str, *, n_choices: int, reasoning_field: ReasoningField, includes_usage: bool, has_logprobs: bool
    ) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._n_choices, self._field = n_choices, reasoning_field
        self._includes_usage, self._has_logprobs = includes_usage, has_logprobs
        self._in_tags: set[int] = set()  # choices whose <think> is not closed

    def start(self, n_prompt: int) -> bytes:
        """The role of each choice."""
        first = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, first) for index in range(self._n_choices))

    def delta(self, event: Delta) -> bytes:
        """Thinking and answer in chunks of their own."""
        out = b""
        if event.reasoning and (fields := self._reasoning(event)):
            shown = event.reasoning_logprobs if self._field != "none" else ()
            out += self._chunk(event.choice, fields, reasoning_logprobs=shown)
        if event.content:
            content = self._closed(event.choice) + event.content
            out += self._chunk(event.choice, {"content": content}, logprobs=event.logprobs)
        return out

    def end(self, event: Ended) -> bytes:
        """The reason, once."""
        tag = self._closed(event.choice)
        return self._chunk(event.choice, {"content": tag} if tag else {}, finish=event.finish)

    def finish(self, ended: list[Ended]) -> bytes:
        """Usage where it was asked for, and the mark of the end."""
        usage = b""
        if self._includes_usage:
            usage = event_line({**self._top("chat.completion.chunk"), "choices": [], "usage": _usage(ended)})
        return usage + b"data: [DONE]\n\n"

    def heartbeat(self) -> bytes:
        """A comment, which clients skip."""
        return b": keepalive\n\n"

    def failure(self, error: ApiError) -> bytes:
        """An error in place of a chunk, and the end."""
        return event_line(error_body(error, PATH)) + b"data: [DONE]\n\n"

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The completion."""
        return {
            **self._top("chat.completion"),
            "choices": [self._choice(each) for each in ended],
            "usage": _usage(ended),
        }

    def _choice(self, ended: Ended) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ended.content, "refusal": None}
        if self._field == "think-tags":
            message["content"] = f"<think>\n{ended.reasoning}\n</think>\n\n{ended.content}"
        else:
            message.update(dict.fromkeys(_names(self._field), ended.reasoning))
        logprobs = None
        if self._has_logprobs:
            logprobs = {"content": list(ended.logprobs), "refusal": None}
            if self._field != "none":
                logprobs["reasoning_logprobs"] = list(ended.reasoning_logprobs)
        return {"index": ended.choice, "message": message, "logprobs": logprobs, "finish_reason": ended.finish}

    def _reasoning(self, event: Delta) -> dict[str, str]:
        if self._field != "think-tags":
            return dict.fromkeys(_names(self._field), event.reasoning)
        opening = "" if event.choice in self._in_tags else "<think>\n"
        self._in_tags.add(event.choice)
        return {"content": opening + event.reasoning}

    def _closed(self, choice: int) -> str:
        if choice not in self._in_tags:
            return ""
        self._in_tags.remove(choice)
        return "\n</think>\n\n"

    def _top(self, kind: str) -> dict[str, Any]:
        return {"id": self._head["id"], "object": kind, "created": self._head["created"], "model": self._head["model"]}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: tuple[LogprobEntry, ...] = (),
        reasoning_logprobs: tuple[LogprobEntry, ...] = (),
        finish: str | None = None,
    ) -> bytes:
        shown: dict[str, Any] | None = None
        if self._has_logprobs and (logprobs or reasoning_logprobs):
            shown = {"content": list(logprobs), "refusal": None}
            if reasoning_logprobs:
                shown["reasoning_logprobs"] = list(reasoning_logprobs)
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish}
        usage = {"usage": None} if self._includes_usage else {}
        return event_line({**self._top("chat.completion.chunk"), "choices": [choice], **usage})


def _names(field: ReasoningField) -> tuple[str, ...]:
    if field == "both":
        return ("reasoning_content", "reasoning")
    return () if field in ("none", "think-tags") else (field,)
