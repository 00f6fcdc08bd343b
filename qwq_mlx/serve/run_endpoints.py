"""The endpoints of runs: start, list, watch, answer now, stop, save, fork, vote, delete.

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
from qwq_mlx.serve.dialects.qwq import PATH, read_fork, read_run, read_vote
from qwq_mlx.serve.responding import PartsResponse
from qwq_mlx.serve.runs import Run, Runs
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.worker import Worker

__all__ = ["RunEndpoints"]


class RunEndpoints:
    """`routes()` for the application."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker, self._settings = worker, settings
        self._runs = Runs(worker, heartbeat_s=settings.heartbeat_s)

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
            Route(f"{one}/fork", self._fork, methods=["POST"]),
            Route(f"{one}/vote", self._vote, methods=["POST"]),
            Route(f"{one}/vote", self._votes, methods=["GET"]),
        ]

    def _run(self, request: Request) -> Run:
        return self._runs.find(request.path_params["id"])

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_json(request, max_bytes=self._settings.body_bytes)

    async def _list(self, request: Request) -> Response:
        return json_response({"runs": [run.to_json() for run in self._runs]})

    async def _start(self, request: Request) -> Response:
        joins = not self._worker.card.has_tags
        ask, question = read_run(await self._body(request), settings=self._settings, joins_thinking=joins)
        return json_response((await self._runs.start(ask, question=question)).to_json(), status=201)

    async def _get(self, request: Request) -> Response:
        return json_response(self._run(request).to_json())

    async def _delete(self, request: Request) -> Response:
        run = self._run(request)
        await run.stop()
        self._runs.remove(run)
        return Response(status_code=204)

    async def _steps(self, request: Request) -> PartsResponse:
        start = request.query_params.get("from", "0")
        if not (start.isdecimal() and len(start) < 10):
            raise ApiError(400, f"from is {start[:40]!r}, expected a token's place.", param="from")
        return PartsResponse(self._runs.lines(self._run(request), int(start)), media_type="application/x-ndjson")

    async def _answer_now(self, request: Request) -> Response:
        run = self._run(request)
        run.job.answer_now()
        return json_response(run.to_json())

    async def _stop(self, request: Request) -> Response:
        run = self._run(request)
        await run.stop()
        return json_response(run.to_json())

    async def _save(self, request: Request) -> Response:
        """Write the run into the server's folder of runs; `generate --resume` goes on with it."""
        run, folder = self._run(request), self._settings.runs_folder
        if folder is None:
            raise ApiError(400, "This server saves no runs. Start it with --runs-folder DIR.", code="not_saving")
        path = folder / f"{run.id}.qwq"
        try:
            await self._worker.save(run.job, path)
        except SavingError as error:
            raise ApiError(507, str(error), code="not_saved") from error
        return json_response({"path": str(path)}, status=201)

    async def _fork(self, request: Request) -> Response:
        run = self._run(request)
        at, seed = read_fork(await self._body(request))
        return json_response(self._runs.fork(run, at=at, seed=seed).to_json(), status=201)

    async def _vote(self, request: Request) -> Response:
        """Samples that share a beginning; they are runs of one group."""
        run = self._run(request)
        n, at = read_vote(await self._body(request))
        samples = await self._runs.vote(run, n=n, at=at)
        return json_response({"group": samples[0].group, "runs": [each.to_json() for each in samples]}, status=201)

    async def _votes(self, request: Request) -> Response:
        """How the samples of a run's votes have answered so far."""
        from qwq_mlx.generate.vote import count_votes  # with MLX, which is loaded by now

        run = self._run(request)
        samples = [each for each in self._runs if each.group and each.parent is not None and each.parent[0] == run.id]
        answers = {place: each.ended.summary["answer"] for place, each in enumerate(samples) if _has_answer(each)}
        groups = [
            {"answer": group.answer, "runs": [samples[place].id for place in group.samples]}
            for group in count_votes(answers)
        ]
        n_running = sum(each.state == "running" for each in samples)
        return json_response({"n": len(samples), "running": n_running, "groups": groups})


def _has_answer(run: Run) -> bool:
    return run.ended is not None and run.ended.summary is not None and run.ended.summary["answer"] is not None
