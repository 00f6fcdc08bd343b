"""OpenAI's older completions: prompts that are continued as they stand, with no template, thinking or answer.

Does not: fill in the middle (`suffix`), or repeat the prompt (`echo`).
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields
from qwq_mlx.serve.dialects.errors import error_body
from qwq_mlx.serve.dialects.fields import MAX_STOPS, MAX_TOP_LOGPROBS, check_model, sampling_of
from qwq_mlx.serve.dialects.openai import SAMPLING, WITHOUT_EFFECT, event_line, read_logit_bias, read_stream_options
from qwq_mlx.serve.jobs import Ask, Delta, Ended, LogprobEntry
from qwq_mlx.serve.settings import Settings

__all__ = ["PATH", "CompletionWriter", "read_completion"]

PATH = "/v1/completions"

_MAX_TOKENS = 16  # OpenAI's default
_NEUTRAL: dict[str, tuple[Any, ...]] = {"echo": (False,), "best_of": (1,), "suffix": ("",)}


def read_completion(body: dict[str, Any], *, settings: Settings, model: str) -> tuple[Ask, CompletionWriter, bool]:
    """A body as an `Ask`, what writes its answer, and whether it is streamed. Raises ApiError."""
    fields = Fields(body)
    check_model(fields.text("model"), model)
    top_logprobs = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    streams = fields.flag("stream") or False
    includes_usage = read_stream_options(fields)
    ask = Ask(
        prompts=_prompts(fields),
        sampling=read_logit_bias(fields, sampling_of(fields, SAMPLING)),
        max_tokens=fields.whole("max_tokens", 1) or _MAX_TOKENS,
        thinking=settings.thinking,
        stop=fields.texts("stop", at_most=MAX_STOPS),
        n=fields.whole("n", 1, 64) or 1,
        top_logprobs=top_logprobs,
    )
    fields.ignore(*WITHOUT_EFFECT)
    fields.refuse_others(_NEUTRAL)
    writer = CompletionWriter(model, n=ask.n, includes_usage=includes_usage, has_logprobs=top_logprobs is not None)
    return ask, writer, streams


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """A text, ids, or a list of either."""
    value = fields.raw("prompt")
    is_one = isinstance(value, str) or (isinstance(value, list) and bool(value) and type(value[0]) is int)
    prompts = [value] if is_one else value
    if not isinstance(prompts, list) or not prompts:
        raise fields.wrong("prompt", "a text, token ids, or a list of them")
    for each in prompts:
        is_ids = isinstance(each, list) and bool(each) and all(type(token_id) is int for token_id in each)
        if not is_ids and not (isinstance(each, str) and each):
            raise fields.wrong("prompt", "a text, token ids, or a list of them, none empty")
    return tuple(each if isinstance(each, str) else tuple(each) for each in prompts)


class CompletionWriter:
    """Chunks of a stream, or one completion."""

    media_type = "text/event-stream"

    def __init__(self, model: str, *, n: int, includes_usage: bool, has_logprobs: bool) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._n, self._includes_usage, self._has_logprobs = n, includes_usage, has_logprobs
        self._n_chars: dict[int, int] = {}

    def start(self, n_prompt: int) -> bytes:
        """Nothing: the first chunk has text."""
        return b""

    def delta(self, event: Delta) -> bytes:
        """More text."""
        start = self._n_chars.get(event.choice, 0)
        self._n_chars[event.choice] = start + len(event.content)
        return event_line(self._chunk(event.choice, event.content, self._logprobs(event.logprobs, start), None))

    def end(self, event: Ended) -> bytes:
        """The reason, once."""
        return event_line(self._chunk(event.choice, "", None, event.finish))

    def finish(self, ended: list[Ended]) -> bytes:
        """Usage where it was asked for, and the mark of the end."""
        usage = event_line({**self._head, "choices": [], "usage": self._usage(ended)}) if self._includes_usage else b""
        return usage + b"data: [DONE]\n\n"

    def heartbeat(self) -> bytes:
        """A comment, which clients skip."""
        return b": keepalive\n\n"

    def failure(self, error: ApiError) -> bytes:
        """An error in place of a chunk, and the end."""
        return event_line(error_body(error, PATH)) + b"data: [DONE]\n\n"

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The completion."""
        choices = [
            {
                "index": each.choice,
                "text": each.content,
                "logprobs": self._logprobs(each.logprobs, 0),
                "finish_reason": each.finish,
            }
            for each in ended
        ]
        return {**self._head, "choices": choices, "usage": self._usage(ended)}

    def _chunk(self, choice: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self._includes_usage else {}
        own = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [own], **usage}

    def _usage(self, ended: list[Ended]) -> dict[str, Any]:
        """Tokens of all; each prompt counts once."""
        n_prompt = sum(each.usage.n_prompt for each in ended if each.choice % self._n == 0)
        n_output = sum(each.usage.n_output for each in ended)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_output,
            "total_tokens": n_prompt + n_output,
            "prompt_tokens_details": {"cached_tokens": sum(each.usage.n_cached for each in ended)},
        }

    def _logprobs(self, entries: tuple[LogprobEntry, ...], start: int) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        offsets, at = [], start
        for entry in entries:
            offsets.append(at)
            at += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }
