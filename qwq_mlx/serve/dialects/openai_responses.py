"""OpenAI's responses, without a memory: each request brings its whole conversation.

The thinking goes out as the summary of a reasoning item, because that is what clients show; it is the whole text.

Does not: keep a response (`store`, `previous_response_id`), or call tools.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from qwq_mlx.serve.api_error import ApiError, not_built
from qwq_mlx.serve.body import Fields, dumped
from qwq_mlx.serve.dialects.fields import EFFORTS, check_model, read_messages, sampling_of, thinking_of
from qwq_mlx.serve.dialects.openai import WITHOUT_EFFECT
from qwq_mlx.serve.jobs import Ask, Delta, Ended
from qwq_mlx.serve.settings import Settings

__all__ = ["PATH", "ResponseWriter", "read_response"]

PATH = "/v1/responses"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),  # there is none, and clients ask for it always
    "top_logprobs": (0,),
}


def read_response(
    body: dict[str, Any], *, settings: Settings, model: str, joins_thinking: bool
) -> tuple[Ask, ResponseWriter, bool]:
    """A body as an `Ask`, what writes its answer, and whether it is streamed. Raises ApiError."""
    fields = Fields(body)
    check_model(fields.text("model"), model)
    streams = fields.flag("stream") or False
    instructions = fields.text("instructions")
    messages = read_messages(_as_messages(fields), joins_thinking=joins_thinking)
    if instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    effort, summary = None, None
    if (reasoning := fields.inner("reasoning")) is not None:
        effort = reasoning.choice("effort", tuple(EFFORTS))
        summary = reasoning.choice("summary", ("auto", "concise", "detailed", "none"))
        reasoning.ignore("generate_summary")
        reasoning.refuse_others()
    if (text := fields.inner("text")) is not None:
        text.refuse_others({"format": ({"type": "text"},), "verbosity": ("medium",)})
    is_wanted = effort != "none"
    ask = Ask(
        messages=tuple(messages),
        sampling=sampling_of(fields, ("temperature", "top_p", "top_k", "min_p")),
        max_tokens=fields.whole("max_output_tokens", 1),
        thinking=thinking_of(settings, EFFORTS[effort] if effort else None, is_wanted=is_wanted),
    )
    if (options := fields.inner("stream_options")) is not None:
        options.ignore("include_obfuscation")
        options.refuse_others()
    fields.ignore(*WITHOUT_EFFECT)
    fields.refuse_others(_NEUTRAL)
    told = {
        "instructions": instructions,
        "max_output_tokens": ask.max_tokens,
        "temperature": ask.sampling.temperature,
        "top_p": ask.sampling.top_p,
        "reasoning": {"effort": effort, "summary": summary},
    }
    return ask, ResponseWriter(model, told, shows_thinking=is_wanted), streams


def _as_messages(fields: Fields) -> Fields:
    """The input in the form of chat messages: reasoning items become the thinking of the message behind them."""
    value = fields.raw("input")
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise fields.wrong("input", "a text or a list of items")
    messages, thought = [], ""
    for place, item in enumerate(items):
        inner = Fields(item, f"input[{place}].")
        kind = inner.text("type") or "message"
        if kind == "reasoning":
            parts = inner.items("content") or inner.items("summary")
            for each in parts:
                thought += Fields(each, f"input[{place}].content.").text("text") or ""
            continue
        if kind != "message":
            raise not_built(f"input[{place}].type", f"is {kind[:80]!r}, which is not implemented.")
        own = {name: each for name, each in item.items() if name not in ("type", "id", "status")}
        if own.get("role") == "assistant" and thought:
            own, thought = {"reasoning": thought, **own}, ""
        messages.append(own)
    return Fields({"messages": messages})


class ResponseWriter:
    """Events of a stream in the order that clients expect, or one response."""

    media_type = "text/event-stream"

    def __init__(self, model: str, told: dict[str, Any], *, shows_thinking: bool) -> None:
        self._base = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "user": None,
            **told,
        }
        self._shows_thinking = shows_thinking
        self._n_events = 0
        self._output: list[dict[str, Any]] = []  # items that are whole
        self._open: dict[str, Any] | None = None  # the item that is written
        self._text = ""  # of that item

    def start(self, n_prompt: int) -> bytes:
        """The response, still empty."""
        return self._of_response("response.created") + self._of_response("response.in_progress")

    def delta(self, event: Delta) -> bytes:
        """Thinking and answer as parts of items of their own."""
        out = b""
        if event.reasoning and self._shows_thinking:
            out += self._enter("reasoning") + self._more(event.reasoning)
        if event.content:
            out += self._enter("message") + self._more(event.content)
        return out

    def end(self, event: Ended) -> bytes:
        """The last item is whole."""
        return self._leave()

    def finish(self, ended: list[Ended]) -> bytes:
        """The whole response."""
        final = self._response(self._output, ended[0])
        return self._event(f"response.{final['status']}", {"response": final})

    def heartbeat(self) -> bytes:
        """An event, because some clients count no comments."""
        return self._of_response("response.in_progress")

    def failure(self, error: ApiError) -> bytes:
        """The response, failed."""
        told = {"code": "server_error", "message": str(error)}
        failed = {**self._base, "status": "failed", "error": told, "output": self._output, "usage": None}
        return self._event("response.failed", {"response": {**failed, "incomplete_details": None}})

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The response."""
        one = ended[0]
        output = [_reasoning_item(_item_id("rs"), one.reasoning)] if one.reasoning and self._shows_thinking else []
        return self._response([*output, _message_item(_item_id("msg"), one.content)], one)

    def _response(self, output: list[dict[str, Any]], ended: Ended) -> dict[str, Any]:
        is_cut = ended.finish == "length"
        usage = ended.usage
        return {
            **self._base,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": output,
            "usage": {
                "input_tokens": usage.n_prompt,
                "input_tokens_details": {"cached_tokens": usage.n_cached},
                "output_tokens": usage.n_output,
                "output_tokens_details": {"reasoning_tokens": usage.n_reasoning},
                "total_tokens": usage.n_prompt + usage.n_output,
            },
        }

    def _of_response(self, kind: str) -> bytes:
        response = {**self._base, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        return self._event(kind, {"response": response})

    def _enter(self, kind: str) -> bytes:
        """Begin an item of this kind, unless it is the one that is written."""
        if self._open is not None and self._open["type"] == kind:
            return b""
        out = self._leave()
        self._text = ""
        is_message = kind == "message"
        self._open = _message_item(_item_id("msg"), None) if is_message else _reasoning_item(_item_id("rs"), None)
        out += self._event("response.output_item.added", {"output_index": len(self._output), "item": self._open})
        part = {"part": _text_part("")} if is_message else {"part": {"type": "summary_text", "text": ""}}
        name = "response.content_part.added" if is_message else "response.reasoning_summary_part.added"
        return out + self._event(name, {**self._place(), **part})

    def _more(self, text: str) -> bytes:
        self._text += text
        if self._is_message:
            return self._event("response.output_text.delta", {**self._place(), "delta": text, "logprobs": []})
        return self._event("response.reasoning_summary_text.delta", {**self._place(), "delta": text})

    def _leave(self) -> bytes:
        """End the item that is written, if there is one."""
        if self._open is None:
            return b""
        place, text = self._place(), self._text
        if self._is_message:
            out = self._event("response.output_text.done", {**place, "text": text, "logprobs": []})
            out += self._event("response.content_part.done", {**place, "part": _text_part(text)})
            item = _message_item(self._open["id"], text)
        else:
            out = self._event("response.reasoning_summary_text.done", {**place, "text": text})
            part = {"type": "summary_text", "text": text}
            out += self._event("response.reasoning_summary_part.done", {**place, "part": part})
            item = _reasoning_item(self._open["id"], text)
        out += self._event("response.output_item.done", {"output_index": len(self._output), "item": item})
        self._output.append(item)
        self._open = None
        return out

    @property
    def _is_message(self) -> bool:
        return self._open is not None and self._open["type"] == "message"

    def _place(self) -> dict[str, Any]:
        assert self._open is not None, "an item is written"
        index = {"content_index": 0} if self._is_message else {"summary_index": 0}
        return {"item_id": self._open["id"], "output_index": len(self._output), **index}

    def _event(self, kind: str, values: dict[str, Any]) -> bytes:
        number, self._n_events = self._n_events, self._n_events + 1
        return f"event: {kind}\ndata: {dumped({'type': kind, 'sequence_number': number, **values})}\n\n".encode()


def _item_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(item_id: str, text: str | None) -> dict[str, Any]:
    """A message; None for one that is not written yet."""
    content = [] if text is None else [_text_part(text)]
    status = "in_progress" if text is None else "completed"
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _reasoning_item(item_id: str, text: str | None) -> dict[str, Any]:
    summary = [] if text is None else [{"type": "summary_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": summary, "encrypted_content": None}
