"""The application: paths of every dialect, each request's way from body to answer, and what goes wrong on it.

Does not: know what stands in any body, or touch the model (`worker` does).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import json_response, read_json
from qwq_mlx.serve.dialects import (
    anthropic,
    ollama,
    ollama_models,
    openai,
    openai_completions,
    openai_responses,
)
from qwq_mlx.serve.dialects.errors import error_response
from qwq_mlx.serve.dialects.fields import check_model
from qwq_mlx.serve.jobs import Ask
from qwq_mlx.serve.metrics import prometheus_text
from qwq_mlx.serve.responding import JobResponse, Writer
from qwq_mlx.serve.run_endpoints import RunEndpoints
from qwq_mlx.serve.runs import Runs
from qwq_mlx.serve.security import Doors
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.static import page_routes
from qwq_mlx.serve.worker import Worker

__all__ = ["make_app"]

Reader = Callable[..., tuple[Ask, Writer, bool]]
"""Makes of a body what is asked, what writes the answer, and whether it is streamed."""


def make_app(
    worker: Worker, settings: Settings, runs: Runs, *, log: Callable[[str], None] = lambda line: None
) -> ASGIApp:
    """The whole application, behind its doors.

    log: takes a line for each request, without what it says, and the frames of an internal error.
    """
    server = _Server(worker, settings)
    get, post = ["GET"], ["POST"]
    routes = [
        *page_routes(),
        Route("/health", server.health, methods=get),
        Route("/metrics", server.metrics, methods=get),
        Route("/v1/models", server.models, methods=get),
        Route("/v1/models/{name:path}", server.model, methods=get),
        Route(openai.PATH, server.chat, methods=post),
        Route(openai_completions.PATH, server.completion, methods=post),
        Route(openai_responses.PATH, server.response, methods=post),
        Route(anthropic.PATH, server.message, methods=post),
        Route(f"{anthropic.PATH}/count_tokens", server.count_tokens, methods=post),
        Route("/api/version", server.ollama_version, methods=get),
        Route("/api/tags", server.ollama_tags, methods=get),
        Route("/api/ps", server.ollama_processes, methods=get),
        Route("/api/show", server.ollama_show, methods=post),
        Route(ollama.CHAT_PATH, server.ollama_chat, methods=post),
        Route(ollama.GENERATE_PATH, server.ollama_generate, methods=post),
        *RunEndpoints(worker, settings, runs).routes(),
        *(Route(f"/api/{name}", server.ollama_not_done, methods=["POST", "DELETE"]) for name in ollama_models.NOT_DONE),
    ]

    async def on_bug(request: Request, error: Exception) -> Response:
        frames = "".join(traceback.format_tb(error.__traceback__))  # without the error's text, which may quote a prompt
        log(f"internal error: {type(error).__name__} in\n{frames}".rstrip())
        told = ApiError(500, f"Internal error: {type(error).__name__}.", code="internal_error")
        return error_response(told, request.url.path)

    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: on_bug},
    )
    return Doors(app, settings=settings, log=log)


class _Server:
    """The endpoints."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker, self._settings = worker, settings
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        state = self._worker.state
        body = {
            "status": {"ready": "ok"}.get(state, state),
            "running": self._worker.n_running,
            "waiting": self._worker.n_waiting,
            "memory": self._worker.memory._asdict(),
        }
        return json_response(body, status=200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        worker = self._worker
        is_ready = worker.state == "ready"
        text = prometheus_text(worker.counters, running=worker.n_running, waiting=worker.n_waiting, is_ready=is_ready)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model, as a list."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The one model."""
        check_model(request.path_params["name"], self._worker.card.name)
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        card = self._worker.card
        return {
            "id": card.name,
            "object": "model",
            "created": self._started,
            "owned_by": "qwq-mlx",
            "max_model_len": card.context,
        }

    async def chat(self, request: Request) -> JobResponse:
        """OpenAI's chat completions."""
        return await self._converse(request, openai.read_chat)

    async def completion(self, request: Request) -> JobResponse:
        """OpenAI's completions of prompts as they stand."""
        body, card = await self._body(request), self._worker.card
        return await self._answer(*openai_completions.read_completion(body, settings=self._settings, model=card.name))

    async def response(self, request: Request) -> JobResponse:
        """OpenAI's responses."""
        return await self._converse(request, openai_responses.read_response)

    async def message(self, request: Request) -> JobResponse:
        """Anthropic's messages."""
        return await self._converse(request, anthropic.read_message)

    async def count_tokens(self, request: Request) -> Response:
        """Anthropic's count of a prompt."""
        body, card = await self._body(request), self._worker.card
        messages = anthropic.read_count(body, model=card.name, joins_thinking=not card.has_tags)
        return json_response({"input_tokens": await self._worker.n_tokens(messages)})

    async def ollama_version(self, request: Request) -> Response:
        """The version whose interface this is."""
        return json_response({"version": ollama_models.VERSION})

    async def ollama_tags(self, request: Request) -> Response:
        """The one model, as a list."""
        return json_response(ollama_models.tags(self._worker.card))

    async def ollama_processes(self, request: Request) -> Response:
        """The one model, which is in memory."""
        return json_response(ollama_models.processes(self._worker.card))

    async def ollama_show(self, request: Request) -> Response:
        """All about the model."""
        return json_response(ollama_models.show(await self._body(request), self._worker.card))

    async def ollama_not_done(self, request: Request) -> Response:
        """What would change models."""
        raise ollama_models.not_done(request.url.path)

    async def ollama_chat(self, request: Request) -> JobResponse | Response:
        """Ollama's chat."""
        body, card = await self._body(request), self._worker.card
        ask, writer, streams = ollama.read_chat(
            body, settings=self._settings, model=card.name, joins_thinking=not card.has_tags
        )
        if ask is None:
            return json_response(ollama.loaded_line(card.name, is_chat=True))
        return await self._answer(ask, writer, streams)

    async def ollama_generate(self, request: Request) -> JobResponse | Response:
        """Ollama's generate."""
        body, card = await self._body(request), self._worker.card
        ask, writer, streams = ollama.read_generate(body, settings=self._settings, model=card.name)
        if ask is None:
            return json_response(ollama.loaded_line(card.name, is_chat=False))
        return await self._answer(ask, writer, streams)

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_json(request, max_bytes=self._settings.body_bytes)

    async def _converse(self, request: Request, read: Reader) -> JobResponse:
        """The answer to a conversation, in which a client may send the thinking back."""
        body, card = await self._body(request), self._worker.card
        asked = read(body, settings=self._settings, model=card.name, joins_thinking=not card.has_tags)
        return await self._answer(*asked)

    async def _answer(self, ask: Ask, writer: Writer, streams: bool) -> JobResponse:
        job = await self._worker.prepare(ask)
        self._worker.submit(job)
        return JobResponse(job, writer, streams=streams, heartbeat_s=self._settings.heartbeat_s)


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error_response(cast("ApiError", error), request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    error = cast("HTTPException", error)
    status = error.status_code
    path, code = request.url.path, {404: "not_found", 405: "method_not_allowed"}.get(status)
    message = {404: f"There is nothing at {path[:200]}.", 405: f"{request.method} is not allowed at {path[:200]}."}
    told = ApiError(status, message.get(status, f"HTTP status {status}."), code=code)
    return error_response(told, path, headers=error.headers)
