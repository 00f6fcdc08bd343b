"""Runs that outlive requests: their steps are the engine's, and forks, votes and answers are drawn as it draws them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import QUESTION, Served, held_steps, until

from qwq_mlx.errors import OptionError
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Inspect, Limits, Sampling
from qwq_mlx.serve import runs
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.jobs import Ask, Failed, Job, Restored, Stepped
from qwq_mlx.serve.run import Run
from qwq_mlx.serve.run_state import SavedRun
from qwq_mlx.serve.settings import Settings
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

RUNS = "/api/qwq/runs"
LONG = "Add one pair of parentheses to make this equation true: 4 + 5 * 6 - 1 * 7 = 39"


@pytest.fixture(scope="module")
def trace(pocket_reasoner: Reasoner) -> Trace:
    return pocket_reasoner.generate(
        QUESTION, sampling=Sampling(temperature=0.9, seed=4), inspect=Inspect(top_k=2, loop_scores=True)
    )


@pytest.fixture(scope="module")
def run(pocket_server: Served) -> dict[str, Any]:
    """A run of the trace's settings, started."""
    started: dict[str, Any] = pocket_server.post(
        RUNS, {"question": QUESTION, "temperature": 0.9, "seed": 4, "alternatives": 2}, status=201
    )
    return started


def steps(served: Served, run_id: str, start: int = 0) -> tuple[list[Any], Any]:
    """The steps of a run to its end, and what the run is then."""
    status, headers, raw = served.send("GET", f"{RUNS}/{run_id}/steps?from={start}")
    assert status == 200 and headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in raw.splitlines() if line]
    return lines[:-1], lines[-1]["run"]


def test_the_steps_of_a_run_are_those_of_the_engine(pocket_server: Served, run: dict[str, Any], trace: Trace) -> None:
    assert run["state"] == "running" and run["question"] == QUESTION and run["seed"] == 4
    got, ended = steps(pocket_server, run["id"])
    assert [step["id"] for step in got] == list(trace.ids) and [step["text"] for step in got] == list(trace.texts)
    assert [step["index"] for step in got] == list(range(len(got)))
    for step, entropy, alternatives in zip(got, trace.entropies, trace.alternatives, strict=True):
        assert step["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert [each["id"] for each in step["alternatives"]] == [each.id for each in alternatives]
    assert got[-1]["loop_scores"] is not None and ended["state"] == "ended"
    summary = ended["summary"]
    assert (summary["answer"], summary["confidence"]) == (trace.answer, trace.confidence)
    assert summary["conclusion_span"] == list(trace.conclusion_span or ())
    assert steps(pocket_server, run["id"], 20)[0] == got[20:]
    assert pocket_server.get(f"{RUNS}/{run['id']}") == ended
    assert ended in pocket_server.get(RUNS)["runs"]


def test_a_fork_shares_a_beginning_and_draws_the_rest(
    pocket_server: Served, run: dict[str, Any], trace: Trace, pocket_reasoner: Reasoner
) -> None:
    steps(pocket_server, run["id"])
    forked = pocket_server.post(f"{RUNS}/{run['id']}/fork", {"at": 5, "seed": 9}, status=201)
    got, ended = steps(pocket_server, forked["id"])
    source = pocket_reasoner.stream(QUESTION, sampling=Sampling(temperature=0.9, seed=4))
    for _ in range(6):
        next(source)
    alone = source.fork(at=5, seed=9)
    assert [step["id"] for step in got] == [*trace.ids[:5], *(step.id for step in alone)]
    assert ended["parent"] == {"id": run["id"], "at": 5} and ended["state"] == "ended"


def test_a_vote_counts_the_answers_of_samples(pocket_server: Served, run: dict[str, Any]) -> None:
    steps(pocket_server, run["id"])
    vote = pocket_server.post(f"{RUNS}/{run['id']}/vote", {"n": 2}, status=201)
    answers = [steps(pocket_server, each["id"])[1]["summary"]["answer"] for each in vote["runs"]]
    counted = pocket_server.get(f"{RUNS}/{run['id']}/vote")
    assert counted["n"] == 2 and counted["running"] == 0
    assert sum(len(group["runs"]) for group in counted["groups"]) == sum(answer is not None for answer in answers)


def test_head_of_a_runs_steps_does_not_wait_for_its_end(pocket_server: Served) -> None:
    with held_steps():
        run = pocket_server.post(RUNS, {"question": "x", "temperature": 1.5}, status=201)["id"]
        status, headers, _ = pocket_server.send("HEAD", f"{RUNS}/{run}/steps")
        assert status == 200 and headers["content-type"] == "application/x-ndjson"
        assert pocket_server.get(f"{RUNS}/{run}")["state"] == "running"
        pocket_server.post(f"{RUNS}/{run}/stop", {})


def test_a_run_is_asked_for_its_answer_stopped_and_deleted(pocket_server: Served) -> None:
    with held_steps() as allow:
        first = pocket_server.post(RUNS, {"question": LONG, "temperature": 0}, status=201)
        allow(8)
        until(lambda: pocket_server.get(f"{RUNS}/{first['id']}")["tokens"] > 3)
        pocket_server.post(f"{RUNS}/{first['id']}/answer-now", {})
    _, ended = steps(pocket_server, first["id"])
    assert ended["summary"]["injections"][0]["reason"] == "answered"
    with held_steps():
        body = {"messages": [{"role": "user", "content": LONG}], "temperature": 0}
        second = pocket_server.post(RUNS, body, status=201)
        assert pocket_server.post(f"{RUNS}/{second['id']}/stop", {})["state"] == "stopped"
    assert steps(pocket_server, second["id"])[1]["state"] == "stopped"
    until(lambda: pocket_server.is_idle)
    assert pocket_server.send("DELETE", f"{RUNS}/{second['id']}")[0] == 204
    assert pocket_server.send("GET", f"{RUNS}/{second['id']}")[0] == 404


@dataclass(frozen=True)
class FakeRequest:
    """What a run reads of its request."""

    prompt_ids: tuple[int, ...] = (1,)
    question: str = ""
    sampling: Sampling = field(default_factory=lambda: Sampling(seed=1))
    limits: Limits = field(default_factory=Limits)
    inspect: Inspect = field(default_factory=Inspect)
    forked_at: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    model: Any = field(default_factory=lambda: SimpleNamespace(compute_type="float32"))


class FakeWorker:
    """Takes so many jobs and does nothing with them."""

    card = SimpleNamespace(name="fake", identity="0")

    def __init__(self, n_taken: int = 100) -> None:
        self.n_taken = n_taken
        self.jobs: list[Job] = []

    async def prepare(self, ask: Ask) -> Job:
        return Job(ask, [FakeRequest()])  # type: ignore[list-item]

    async def resume(self, saved: SavedRun) -> Job:
        await asyncio.sleep(0)  # so that others come between
        return Job(Ask(), [FakeRequest()], source=Restored(state=SimpleNamespace(steps=())))  # type: ignore

    def submit(self, job: Job) -> None:
        if len(self.jobs) == self.n_taken:
            raise ApiError(429, "the line is full")
        self.jobs.append(job)


def test_the_oldest_runs_that_have_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_RUNS", 3)

    async def scenario() -> None:
        known = runs.Runs(FakeWorker(), heartbeat_s=10)  # type: ignore[arg-type]
        first, second, third = [await known.start(Ask(), question=name) for name in "abc"]
        with pytest.raises(ApiError, match="3 runs are under way"):
            await known.start(Ask(), question="d")
        second.stop()
        fourth = await known.start(Ask(), question="d")
        assert list(known) == [fourth, third, first]
        first.steps = [b""] * (runs.MAX_STEPS + 1)
        first.stop()
        third.stop()
        fifth = await known.start(Ask(), question="e")
        assert list(known) == [fifth, fourth, third], "without the first there are few steps"
        fourth.stop()
        fifth.stop()

    asyncio.run(scenario())


def test_of_runs_that_the_history_has_whole_few_steps_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_KEPT_STEPS", 5)

    async def scenario() -> None:
        known = runs.Runs(FakeWorker(), heartbeat_s=10)  # type: ignore[arg-type]
        first, second, third, running = [await known.start(Ask(), question=name) for name in "abcd"]
        for run in (first, second, third, running):
            run.steps = [b""] * 4
            run.is_kept_whole = run is not second
        for run in (first, second, third):
            run.stop()
        fifth = await known.start(Ask(), question="e")
        assert list(known) == [fifth, running, third, second], "the history lacks the second, and the fourth goes on"
        running.stop()
        fifth.stop()

    asyncio.run(scenario())


def test_a_vote_that_the_line_cannot_take_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        worker = FakeWorker(n_taken=3)
        known = runs.Runs(worker, heartbeat_s=10)  # type: ignore[arg-type]
        run = await known.start(Ask(), question="a")
        with pytest.raises(ApiError, match="the line is full"):
            await known.vote(run, n=4, at=0)
        assert list(known) == [run] and [job.is_cancelled for job in worker.jobs] == [False, True, True]
        run.stop()

    asyncio.run(scenario())


def test_a_run_that_two_resume_at_once_goes_on_once_and_one_that_is_deleted_meanwhile_does_not(tmp_path: Path) -> None:
    (tmp_path / "run-1.qwq").touch()

    async def scenario() -> None:
        worker = FakeWorker()
        known = runs.Runs(worker, heartbeat_s=10, folder=tmp_path)  # type: ignore[arg-type]

        def resume(run_id: str) -> Coroutine[Any, Any, Run]:
            return known.resume(run_id, max_tokens=None, context=None, answer_now=False)

        both = await asyncio.gather(resume("run-1"), resume("run-1"), return_exceptions=True)
        # Each looks for its file in a thread, so either may be the first.
        [run] = [each for each in both if isinstance(each, Run)]
        [error] = [each for each in both if each is not run]
        assert isinstance(error, ApiError) and "goes on already" in str(error) and len(worker.jobs) == 1
        run.stop()
        (tmp_path / "run-1.qwq").unlink()
        error, _ = await asyncio.gather(resume("run-1"), known.remove("run-1"), return_exceptions=True)
        assert "There is no run" in str(error) and len(worker.jobs) == 1 and not list(known)
        with pytest.raises(ApiError, match="There is no run"):
            await resume("1" * 300)  # longer than a file's name

    asyncio.run(scenario())


@pytest.mark.parametrize("n_ticks", range(5))
def test_who_leaves_in_the_moment_of_an_event_has_left(n_ticks: int) -> None:
    """Without a clock: the cancellation comes so many turns of the loop behind the event."""

    async def scenario() -> None:
        known = runs.Runs(FakeWorker(), heartbeat_s=10)  # type: ignore[arg-type]
        run = await known.start(Ask(), question="a")
        job = Job(Ask(), [FakeRequest()])  # type: ignore[list-item]
        lines = known.lines(run, 0)
        for waits, happens in (
            (job.next_event(10), lambda: job._events.put_nowait(Stepped(choice=0, steps=()))),
            (lines.__anext__(), run.tell),
        ):
            waiter = asyncio.ensure_future(waits)
            for _ in range(3):
                await asyncio.sleep(0)
            happens()
            for _ in range(n_ticks):
                await asyncio.sleep(0)
            if waiter.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await waiter
        run.stop()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_long_run_is_read_in_pieces() -> None:
    async def scenario() -> None:
        known = runs.Runs(FakeWorker(), heartbeat_s=10)  # type: ignore[arg-type]
        run = await known.start(Ask(), question="a")
        run.steps = [b"%d\n" % index for index in range(1_200)]
        run.stop()
        parts = [part async for part in known.lines(run, 100)]
        assert [part.count(b"\n") for part in parts] == [500, 500, 100, 1]
        assert b"".join(parts[:3]) == b"".join(run.steps[100:])

    asyncio.run(scenario())


def test_a_run_that_fails_behind_its_last_step_has_failed() -> None:
    """The job is cancelled at once, the events come a moment later."""

    async def scenario() -> None:
        known = runs.Runs(FakeWorker(), heartbeat_s=10)  # type: ignore[arg-type]
        run = await known.start(Ask(), question="a")
        assert run.job is not None
        run.job.emit(Stepped(choice=0, steps=({"index": 0},)))
        run.job.emit(Failed(error=ApiError(500, "a logit is NaN")))
        run.job.cancel()
        assert [json.loads(line) async for line in known.lines(run, 0)][-1]["run"]["error"] == "a logit is NaN"
        assert (run.state, len(run.steps)) == ("failed", 1)

    asyncio.run(scenario())


def test_a_run_whose_events_cannot_be_taken_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        log: list[str] = []
        known = runs.Runs(FakeWorker(), heartbeat_s=10, warn=log.append)  # type: ignore[arg-type]
        run = await known.start(Ask(), question="a")

        async def fail(run: Run, event: Any = None) -> None:
            raise MemoryError

        monkeypatch.setattr(known, "_keep", fail)
        assert run.job is not None
        run.job.emit(Failed(error=ApiError(500, "a logit is NaN")))
        last = [json.loads(line) async for line in known.lines(run, 0)][-1]["run"]
        assert (last["state"], last["error"]) == ("failed", "Internal error: MemoryError.") and run.job.is_cancelled
        assert log == [f"{run.id}: internal error: MemoryError"]

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [None, MemoryError("no room for it")])
def test_an_end_at_once_waits_for_no_save_and_a_save_that_fails_is_told(
    tmp_path: Path, error: BaseException | None
) -> None:
    """The model's thread may hang, and the HTTP thread would wait for it for ever."""
    left = iter([0.0, 0.0, 0.0, 0.0])

    async def scenario() -> None:
        class Saving(FakeWorker):
            async def save(self, job: Job, path: Path) -> None:
                if error is not None:
                    raise error
                await asyncio.Event().wait()

        log: list[str] = []
        known = runs.Runs(Saving(), heartbeat_s=10, folder=tmp_path, warn=log.append)  # type: ignore[arg-type]
        await known.start(Ask(), question="a")
        await asyncio.wait_for(known.drain(lambda: next(left, -math.inf)), 20)
        assert ("no room for it" if error else "the end came before it was saved") in log[0]

    asyncio.run(scenario())


def test_a_saved_run_goes_on_as_if_it_had_never_stopped(
    pocket_server: Served, trace: Trace, pocket_reasoner: Reasoner
) -> None:
    body = {"question": QUESTION, "temperature": 0.9, "seed": 4, "max_tokens": 12}
    run_id = pocket_server.post(RUNS, body, status=201)["id"]
    steps(pocket_server, run_id)
    path = pocket_server.post(f"{RUNS}/{run_id}/save", {}, status=201)["path"]
    assert Path(path).name == f"{run_id}.qwq"
    resumed = pocket_reasoner.resume(path, max_tokens=200)
    assert tuple(step.id for step in resumed) == trace.ids  # nobody has iterated over them, so the first 12 come too


def test_a_server_without_a_folder_saves_nothing(tiny_server: Served) -> None:
    run_id = tiny_server.post(RUNS, {"question": "x", "max_tokens": 1}, status=201)["id"]
    steps(tiny_server, run_id)
    assert "--runs-folder" in tiny_server.post(f"{RUNS}/{run_id}/save", {}, status=400)["error"]
    with pytest.raises(OptionError, match="is no folder"):
        Settings(runs_folder=Path("nowhere"))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("", {}, "question or messages"),
        ("", {"question": "x", "messages": []}, "question or messages"),
        ("", {"question": ""}, "prompt is empty"),
        ("", {"question": "x", "on_loop": "nudge"}, "on_loop"),
        ("", {"question": "x", "stream": True}, "stream"),
        ("/{id}/fork", {}, "at is missing"),
        ("/{id}/fork", {"at": 10_000}, "expected from 0 to"),
        ("/{id}/vote", {"n": 100}, "n is 100"),
    ],
)
def test_what_a_run_cannot_be_is_told(
    pocket_server: Served, run: dict[str, Any], path: str, body: dict[str, Any], said: str
) -> None:
    assert said in pocket_server.post(RUNS + path.format(id=run["id"]), body, status=400)["error"]
