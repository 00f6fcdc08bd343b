"""Ollama's chat and generate: one JSON object a line, with times in nanoseconds.

Does not: load, unload or change a model because of a request (`keep_alive` is taken and changes nothing).
"""

from __future__ import annotations

import datetime
import time
from typing import Any

from qwq_mlx.options import Thinking
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields, dumped
from qwq_mlx.serve.dialects.fields import (
    EFFORTS,
    MAX_TOP_LOGPROBS,
    check_model,
    read_messages,
    sampling_of,
    thinking_of,
)
from qwq_mlx.serve.jobs import Ask, Delta, Ended
from qwq_mlx.serve.settings import Settings

__all__ = ["CHAT_PATH", "GENERATE_PATH", "LineWriter", "loaded_line", "now_text", "read_chat", "read_generate"]

CHAT_PATH, GENERATE_PATH = "/api/chat", "/api/generate"

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_MAX_STOPS = 16
# They say how llama.cpp runs, and change no token here.
_OF_THE_RUNNER = (
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "numa",
    "f16_kv",
    "vocab_only",
)
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "repeat_last_n": (-1, 64),  # -1 is all, as here; 64 is Ollama's default, which clients send unasked
    "mirostat": (0,),
    "mirostat_eta": (0.1,),
    "mirostat_tau": (5, 5.0),
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
    "penalize_newline": (False, True),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "format": ("",),
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "truncate": (True, False),
    "shift": (True, False),
}


def read_chat(
    body: dict[str, Any], *, settings: Settings, model: str, joins_thinking: bool
) -> tuple[Ask | None, LineWriter, bool]:
    """A body as an `Ask` (None: it only asks whether the model is there), what writes its answer, and streaming."""
    fields = Fields(body)
    _check_model(fields, model)
    has_messages = bool(fields.raw("messages"))
    messages = read_messages(fields, joins_thinking=joins_thinking) if has_messages else []
    return _rest(fields, settings, model, messages=tuple(messages), prompts=(), is_chat=True)


def read_generate(body: dict[str, Any], *, settings: Settings, model: str) -> tuple[Ask | None, LineWriter, bool]:
    """As `read_chat`, of a prompt with an optional system prompt; `raw` continues it as it stands."""
    fields = Fields(body)
    _check_model(fields, model)
    prompt, system = fields.text("prompt") or "", fields.text("system") or ""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    is_raw = fields.flag("raw") or False
    if is_raw and system:
        raise ApiError(400, "system and raw exclude each other.", param="system")
    asked = tuple(messages) if prompt and not is_raw else ()
    return _rest(fields, settings, model, messages=asked, prompts=(prompt,) if prompt and is_raw else (), is_chat=False)


def _check_model(fields: Fields, model: str) -> None:
    named = fields.text("model")
    if not named:
        raise fields.wrong("model", f"the name of the model, {model!r}")
    check_model(named, model)


def _rest(
    fields: Fields,
    settings: Settings,
    model: str,
    *,
    messages: tuple[dict[str, str], ...],
    prompts: tuple[str, ...],
    is_chat: bool,
) -> tuple[Ask | None, LineWriter, bool]:
    is_streamed = fields.flag("stream")
    thinking, shows_thinking = _thinking(fields, settings)
    wants_logprobs = fields.flag("logprobs") or False
    top_logprobs = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    options = fields.inner("options") or Fields({}, "options.")
    n_predict = options.whole("num_predict", -2)
    ask = Ask(
        messages=messages,
        prompts=prompts,
        sampling=sampling_of(options, _SAMPLING),
        max_tokens=n_predict if n_predict and n_predict > 0 else None,
        context=options.whole("num_ctx", 2),
        thinking=thinking,
        stop=options.texts("stop", at_most=_MAX_STOPS),
        top_logprobs=top_logprobs if wants_logprobs else None,
    )
    options.ignore(*_OF_THE_RUNNER)
    options.refuse_others(_NEUTRAL_OPTIONS)
    fields.ignore("keep_alive")
    fields.refuse_others(_NEUTRAL)
    writer = LineWriter(model, is_chat=is_chat, shows_thinking=shows_thinking, has_logprobs=wants_logprobs)
    return ask if messages or prompts else None, writer, is_streamed is not False


def _thinking(fields: Fields, settings: Settings) -> tuple[Thinking, bool]:
    value = fields.raw("think")
    if value is None or value is True:
        return thinking_of(settings, None), True
    if value is False:
        return thinking_of(settings, None, is_wanted=False), False
    if not isinstance(value, str) or value not in EFFORTS:
        raise fields.wrong("think", f"true, false or one of {', '.join(EFFORTS)}")
    is_wanted = value != "none"
    return thinking_of(settings, EFFORTS[value], is_wanted=is_wanted), is_wanted


def now_text(seconds: float | None = None) -> str:
    """A time as Ollama writes it; None is now."""
    moment = datetime.datetime.fromtimestamp(time.time() if seconds is None else seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def loaded_line(model: str, *, is_chat: bool) -> dict[str, Any]:
    """The answer to a request without a question: the model is loaded."""
    empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return {"model": model, "created_at": now_text(), **empty, "done": True, "done_reason": "load"}


class LineWriter:
    """Lines of a stream, or one object."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, *, is_chat: bool, shows_thinking: bool, has_logprobs: bool) -> None:
        self._model, self._is_chat = model, is_chat
        self._shows_thinking, self._has_logprobs = shows_thinking, has_logprobs
        self._began = time.monotonic()

    def start(self, n_prompt: int) -> bytes:
        """Nothing: the first line has text."""
        return b""

    def delta(self, event: Delta) -> bytes:
        """Thinking and answer in lines of their own."""
        out = b""
        if event.reasoning and self._shows_thinking:
            out += self._line("", event.reasoning, event.reasoning_logprobs)
        if event.content:
            out += self._line(event.content, "", event.logprobs)
        return out

    def end(self, event: Ended) -> bytes:
        """The last line, with the counts."""
        return self._dumped({**self._texts("", ""), **self._final(event)})

    def finish(self, ended: list[Ended]) -> bytes:
        """Nothing: the last line has come."""
        return b""

    def heartbeat(self) -> bytes:
        """A line without text."""
        return self._line("", "", ())

    def failure(self, error: ApiError) -> bytes:
        """The error as a line."""
        return f"{dumped({'error': str(error)})}\n".encode()

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The one object."""
        one = ended[0]
        shown = one.reasoning if self._shows_thinking else ""
        logprobs = (
            {"logprobs": [*(one.reasoning_logprobs if shown else ()), *one.logprobs]} if self._has_logprobs else {}
        )
        return {**self._head(), **self._texts(one.content, shown), **logprobs, **self._final(one)}

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now_text()}

    def _texts(self, content: str, thinking: str) -> dict[str, Any]:
        shown = {"thinking": thinking} if thinking else {}
        if self._is_chat:
            return {"message": {"role": "assistant", "content": content, **shown}}
        return {"response": content, **shown}

    def _line(self, content: str, thinking: str, logprobs: tuple[dict[str, Any], ...]) -> bytes:
        own = {"logprobs": list(logprobs)} if self._has_logprobs and logprobs else {}
        return self._dumped({**self._texts(content, thinking), **own, "done": False})

    def _dumped(self, values: dict[str, Any]) -> bytes:
        return f"{dumped({**self._head(), **values})}\n".encode()

    def _final(self, ended: Ended) -> dict[str, Any]:
        usage = ended.usage
        return {
            "done": True,
            "done_reason": ended.finish,
            "total_duration": _nanoseconds(time.monotonic() - self._began),
            "load_duration": 0,
            "prompt_eval_count": usage.n_prompt,
            "prompt_eval_duration": _nanoseconds(usage.prefill_s),
            "eval_count": usage.n_output,
            "eval_duration": _nanoseconds(usage.decode_s),
        }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
