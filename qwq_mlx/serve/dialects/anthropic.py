"""Anthropic's messages: thinking blocks before text blocks, and a budget of thinking that is kept.

Thinking that a client did not enable is hidden and counted: the model thinks all the same.

Does not: call tools, read images or documents, or sign thinking (the signature is a constant).
"""

from __future__ import annotations

import secrets
from typing import Any

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields, dumped
from qwq_mlx.serve.dialects.errors import error_body
from qwq_mlx.serve.dialects.fields import EFFORTS, check_model, read_messages, sampling_of, split_parts, thinking_of
from qwq_mlx.serve.jobs import Ask, Delta, Ended, Usage
from qwq_mlx.serve.settings import Settings

__all__ = ["PATH", "MessageWriter", "read_count", "read_message"]

PATH = "/v1/messages"

_MAX_STOPS = 16
_SIGNATURE = "unsigned"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "mcp_servers": ([],),
    "context_management": ({}, {"edits": []}),
}


def read_message(
    body: dict[str, Any], *, settings: Settings, model: str, joins_thinking: bool
) -> tuple[Ask, MessageWriter, bool]:
    """A body as an `Ask`, what writes its answer, and whether it is streamed. Raises ApiError."""
    fields = Fields(body)
    messages = _conversation(fields, model, joins_thinking)
    streams = fields.flag("stream") or False
    max_tokens = fields.whole("max_tokens", 1)
    if max_tokens is None:
        raise fields.wrong("max_tokens", "a whole number of tokens")
    budget, shows, is_refused = _thinking(fields, max_tokens)
    ask = Ask(
        messages=messages,
        sampling=sampling_of(fields, ("temperature", "top_p", "top_k"), seed=False),
        max_tokens=max_tokens,
        thinking=thinking_of(settings, budget, is_wanted=not is_refused),
        stop=fields.texts("stop_sequences", at_most=_MAX_STOPS),
    )
    fields.ignore("metadata", "service_tier", "cache_control")
    fields.refuse_others(_NEUTRAL)
    return ask, MessageWriter(model, shows_thinking=shows), streams


def read_count(body: dict[str, Any], *, model: str, joins_thinking: bool) -> tuple[dict[str, str], ...]:
    """The messages whose tokens are to be counted. Raises ApiError."""
    fields = Fields(body)
    messages = _conversation(fields, model, joins_thinking)
    fields.ignore("thinking", "cache_control", "output_config")
    fields.refuse_others(_NEUTRAL)
    return messages


def _conversation(fields: Fields, model: str, joins_thinking: bool) -> tuple[dict[str, str], ...]:
    check_model(fields.text("model"), model)
    messages = read_messages(fields, joins_thinking=joins_thinking)
    system = split_parts(fields.raw("system"), "system")[1]
    return ({"role": "system", "content": system}, *messages) if system else tuple(messages)


def _thinking(fields: Fields, max_tokens: int) -> tuple[int | None, bool, bool]:
    """Budget, whether the thinking is shown, and whether the client asks for none."""
    effort = None
    if (output := fields.inner("output_config")) is not None:
        effort = output.choice("effort", tuple(EFFORTS))
        output.refuse_others()
    budget = EFFORTS[effort] if effort else None
    thinking = fields.inner("thinking")
    if thinking is None:
        return budget, False, False
    kind = thinking.choice("type", ("enabled", "disabled", "adaptive"))
    own_budget = thinking.whole("budget_tokens", 0)
    display = thinking.choice("display", ("summarized", "omitted"))
    thinking.refuse_others()
    if own_budget is not None and own_budget >= max_tokens:
        raise thinking.wrong("budget_tokens", f"below max_tokens, which is {max_tokens:,}")
    is_shown = kind != "disabled" and display != "omitted"
    return budget if own_budget is None else own_budget, is_shown, kind == "disabled"


class MessageWriter:
    """Events of a stream, or one message."""

    media_type = "text/event-stream"

    def __init__(self, model: str, *, shows_thinking: bool) -> None:
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}
        self._shows_thinking = shows_thinking
        self._n_blocks = 0
        self._open = ""  # kind of the block that is written

    def start(self, n_prompt: int) -> bytes:
        """The message, still empty."""
        usage = _usage(Usage(n_prompt=n_prompt))
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", {"message": message}) + self.heartbeat()

    def delta(self, event: Delta) -> bytes:
        """Thinking and answer in blocks of their own."""
        out = b""
        if event.reasoning and self._shows_thinking:
            out += self._enter("thinking") + self._more({"type": "thinking_delta", "thinking": event.reasoning})
        if event.content:
            out += self._enter("text") + self._more({"type": "text_delta", "text": event.content})
        return out

    def end(self, event: Ended) -> bytes:
        """The last block is whole, and the reason."""
        delta = {"stop_reason": _reason(event), "stop_sequence": event.stop_text}
        return self._leave() + _event("message_delta", {"delta": delta, "usage": _usage(event.usage)})

    def finish(self, ended: list[Ended]) -> bytes:
        """The end."""
        return _event("message_stop", {})

    def heartbeat(self) -> bytes:
        """Anthropic's own sign of life."""
        return _event("ping", {})

    def failure(self, error: ApiError) -> bytes:
        """The error."""
        return _event("error", error_body(error, PATH))

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The message."""
        one = ended[0]
        content: list[dict[str, Any]] = []
        if one.reasoning and self._shows_thinking:
            content.append({"type": "thinking", "thinking": one.reasoning, "signature": _SIGNATURE})
        if one.content:
            content.append({"type": "text", "text": one.content})
        reason = {"stop_reason": _reason(one), "stop_sequence": one.stop_text}
        return {**self._head, "content": content, **reason, "usage": _usage(one.usage)}

    def _enter(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        out, self._open = self._leave(), kind
        empty = {"type": "text", "text": ""} if kind == "text" else {"type": kind, "thinking": "", "signature": ""}
        return out + _event("content_block_start", {"index": self._n_blocks, "content_block": empty})

    def _more(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._n_blocks, "delta": delta})

    def _leave(self) -> bytes:
        if not self._open:
            return b""
        out = self._more({"type": "signature_delta", "signature": _SIGNATURE}) if self._open == "thinking" else b""
        out += _event("content_block_stop", {"index": self._n_blocks})
        self._n_blocks += 1
        self._open = ""
        return out


def _reason(ended: Ended) -> str:
    if ended.stop_text is not None:
        return "stop_sequence"
    return "max_tokens" if ended.finish == "length" else "end_turn"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_output,
    }


def _event(kind: str, values: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {dumped({'type': kind, **values})}\n\n".encode()
