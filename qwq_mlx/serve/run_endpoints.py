"""The endpoints of runs: start, list, watch, answer now, stop, save, resume, fork, vote, delete.

Does not: know how a run goes on (`runs` does), or what stands in a body (`dialects.qwq` does).
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwq_mlx.errors import SavingError
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import json_response, read_json
from qwq_mlx.serve.dialects.qwq import PATH, read_fork, read_resume, read_run, read_vote
from qwq_mlx.serve.responding import PartsResponse
from qwq_mlx.serve.run import Run
from qwq_mlx.serve.runs import Runs
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.worker import Worker

__all__ = ["RunEndpoints"]

_LISTED = 100


class RunEndpoints:
    """`routes()` for the application."""

    def __init__(self, worker: Worker, settings: Settings, runs: Runs) -> None:
        self._worker, self._settings, self._runs = worker, settings, runs

    def routes(self) -> list[Route]:
        """All of them."""
        one = PATH + "/{id}"
        return [
            Route(PATH, self._list, methods=["GET"]),
            Route(PATH, self._start, methods=["POST"]),
            Route(one, self._get, methods=["GET"]),
            Route(one, self._delete, methods=["DELETE"]),
            Route(f"{one}/steps", self._steps, methods=["GET"]),
            Route(f"{one}/answer-now", self._answer_now, methods=["POST"]),
            Route(f"{one}/stop", self._stop, methods=["POST"]),
            Route(f"{one}/save", self._save, methods=["POST"]),
            Route(f"{one}/resume", self._resume, methods=["POST"]),
            Route(f"{one}/fork", self._fork, methods=["POST"]),
            Route(f"{one}/vote", self._vote, methods=["POST"]),
            Route(f"{one}/vote", self._votes, methods=["GET"]),
        ]

    async def _run(self, request: Request) -> Run:
        return await self._runs.find(request.path_params["id"])

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_json(request, max_bytes=self._settings.body_bytes)

    async def _list(self, request: Request) -> Response:
        """The newest runs; `limit` and `offset` say which."""
        limit, offset = _whole(request, "limit", _LISTED), _whole(request, "offset", 0)
        infos = await self._runs.infos(limit=limit, offset=offset)
        return json_response({"runs": infos, "can_save": self._settings.runs_folder is not None})

    async def _start(self, request: Request) -> Response:
        joins = not self._worker.card.has_tags
        ask, question = read_run(await self._body(request), settings=self._settings, joins_thinking=joins)
        return json_response((await self._runs.start(ask, question=question)).to_json(), status=201)

    async def _get(self, request: Request) -> Response:
        return json_response((await self._run(request)).to_json())

    async def _delete(self, request: Request) -> Response:
        await self._runs.remove(request.path_params["id"])
        return Response(status_code=204)

    async def _steps(self, request: Request) -> PartsResponse:
        """The steps `from` a place on, as they come; with wait=0 those that there are."""
        start, waits = _whole(request, "from", 0), _whole(request, "wait", 1) > 0
        lines = self._runs.lines(await self._run(request), start, waits=waits)
        return PartsResponse(lines, media_type="application/x-ndjson")

    async def _answer_now(self, request: Request) -> Response:
        run = await self._run(request)
        if run.job is None or run.state != "running":
            raise ApiError(409, "The run is over. Resume it with answer_now to ask for its answer.", code="not_running")
        run.job.answer_now()
        return json_response(run.to_json())

    async def _stop(self, request: Request) -> Response:
        run = await self._run(request)
        await self._runs.stop(run)
        return json_response(run.to_json())

    async def _save(self, request: Request) -> Response:
        """Write the run into the server's folder of runs; `generate --resume` goes on with it."""
        run = await self._run(request)
        path = self._runs.path_of(run.id)
        if path is None:
            raise ApiError(400, "This server saves no runs. Start it with --runs-folder DIR.", code="not_saving")
        if run.job is None:
            raise ApiError(409, "The run is of an earlier process. Resume it first.", code="not_begun")
        try:
            await self._worker.save(run.job, path)
        except SavingError as error:
            raise ApiError(507, str(error), code="not_saved") from error
        return json_response({"path": str(path)}, status=201)

    async def _resume(self, request: Request) -> Response:
        """Let a run go on that was stopped, saved, cut by a limit, or whose process ended."""
        max_tokens, context, answer_now = read_resume(await self._body(request))
        run_id = request.path_params["id"]
        run = await self._runs.resume(run_id, max_tokens=max_tokens, context=context, answer_now=answer_now)
        return json_response(run.to_json(), status=201)

    async def _fork(self, request: Request) -> Response:
        run = await self._run(request)
        at, seed = read_fork(await self._body(request))
        return json_response((await self._runs.fork(run, at=at, seed=seed)).to_json(), status=201)

    async def _vote(self, request: Request) -> Response:
        """Samples that share a beginning; they are runs of one group."""
        run = await self._run(request)
        n, at = read_vote(await self._body(request))
        samples = await self._runs.vote(run, n=n, at=at)
        return json_response(
            {"group": samples[0].info["group"], "runs": [each.to_json() for each in samples]}, status=201
        )

    async def _votes(self, request: Request) -> Response:
        """How the samples of a run's votes have answered so far."""
        from qwq_mlx.generate.vote import count_votes  # with MLX, which is loaded by now

        run = await self._run(request)
        forks = await self._runs.infos(limit=_LISTED, parent=run.id)
        samples = [each for each in reversed(forks) if each["group"]]
        answers = {place: _answer(each) for place, each in enumerate(samples) if _answer(each) is not None}
        groups = [
            {"answer": group.answer, "runs": [samples[place]["id"] for place in group.samples]}
            for group in count_votes(answers)
        ]
        n_running = sum(each["state"] == "running" for each in samples)
        ids = [each["id"] for each in samples]
        return json_response({"n": len(samples), "running": n_running, "groups": groups, "runs": ids})


def _answer(info: dict[str, Any]) -> Any:
    return None if info["summary"] is None else info["summary"]["answer"]


def _whole(request: Request, name: str, default: int) -> int:
    """A whole number in the query. Raises ApiError."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"{name} is {text[:40]!r}, expected a whole number from 0.", param=name)
    return int(text)
