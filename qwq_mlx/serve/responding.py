"""A job's events as an HTTP answer: a stream, or one body; and the end of the job where the client is gone.

Headers of a stream go out at once. One body begins with spaces, which JSON allows, where it takes long: then the status
was 200 before the end is known, and a failure is told in the body.

Does not: know what any dialect writes (`Writer` says it).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import dumped
from qwq_mlx.serve.dialects.errors import error_body, error_response
from qwq_mlx.serve.jobs import Delta, Ended, Failed, Job

__all__ = ["JobResponse", "PartsResponse", "Writer"]


class Writer(Protocol):
    """What a dialect makes of events. Each of the first five returns bytes of a stream, b"" for none."""

    media_type: str

    def start(self, n_prompt: int) -> bytes:
        """At once, before anything is written. n_prompt: prompt ids."""

    def delta(self, event: Delta) -> bytes:
        """More text."""

    def end(self, event: Ended) -> bytes:
        """A choice is over."""

    def finish(self, ended: list[Ended]) -> bytes:
        """All are."""

    def heartbeat(self) -> bytes:
        """Nothing came for a while."""

    def failure(self, error: ApiError) -> bytes:
        """It cannot go on."""

    def whole(self, ended: list[Ended]) -> dict[str, Any]:
        """The one body. ended: every choice in its order."""


class JobResponse:
    """The answer to one request, as an application of its own."""

    def __init__(self, job: Job, writer: Writer, *, streams: bool, heartbeat_s: float) -> None:
        self._job, self._writer, self._streams, self._heartbeat_s = job, writer, streams, heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; returns early where the client is gone."""
        try:
            if self._streams:
                await PartsResponse(self._parts(), media_type=self._writer.media_type)(scope, receive, send)
            else:
                await _until_done_or_gone(self._one_body(scope, receive, send), receive)
        finally:
            self._job.cancel()

    async def _parts(self) -> AsyncIterator[bytes]:
        writer, ended = self._writer, list[Ended]()
        yield writer.start(self._job.n_prompt)
        while len(ended) < self._job.n_choices:
            event = await self._job.next_event(self._heartbeat_s)
            if event is None:
                yield writer.heartbeat()
            elif isinstance(event, Delta):
                yield writer.delta(event)
            elif isinstance(event, Ended):
                ended.append(event)
                yield writer.end(event)
            elif isinstance(event, Failed):
                yield writer.failure(event.error)
                return
        yield writer.finish(sorted(ended, key=lambda each: each.choice))

    async def _one_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended: list[Ended] = []
        has_begun, loop = False, asyncio.get_running_loop()
        sign_due = loop.time() + self._heartbeat_s
        while len(ended) < self._job.n_choices:
            event = await self._job.next_event(max(0.001, sign_due - loop.time()))
            if isinstance(event, Ended):
                ended.append(event)
            elif isinstance(event, Failed):
                await self._end_body(event.error, None, has_begun, scope, receive, send)
                return
            if loop.time() >= sign_due:
                if not has_begun:
                    await _begin(send, "application/json")
                    has_begun = True
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                sign_due = loop.time() + self._heartbeat_s
        whole = self._writer.whole(sorted(ended, key=lambda each: each.choice))
        await self._end_body(None, whole, has_begun, scope, receive, send)

    async def _end_body(
        self,
        error: ApiError | None,
        whole: dict[str, Any] | None,
        has_begun: bool,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        if error is not None and not has_begun:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if not has_begun:
            await _begin(send, "application/json")
        body = whole if error is None else error_body(error, scope["path"])
        await send({"type": "http.response.body", "body": dumped(body).encode()})


class PartsResponse:
    """A stream of parts, sent as they come; ended where the client is gone."""

    def __init__(self, parts: AsyncIterator[bytes], *, media_type: str) -> None:
        self._parts, self._media_type = parts, media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; returns early where the client is gone. HEAD gets the headers alone."""
        if scope["method"] == "HEAD":
            await _begin(send, self._media_type)
            await send({"type": "http.response.body", "body": b""})
            return
        await _until_done_or_gone(self._stream(send), receive)

    async def _stream(self, send: Send) -> None:
        await _begin(send, self._media_type)
        async for part in self._parts:
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _until_done_or_gone(answer: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Answer, unless the client leaves first."""
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(_until_gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()  # raises what it raised
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _begin(send: Send, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
