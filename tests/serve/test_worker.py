"""The line and the rows: who leaves frees a row, who fails fails alone, and nobody hangs."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import CHAT, Served, held_steps, started, until, user

from qwq_mlx.engine.model_runner import ModelRunner
from qwq_mlx.errors import DamagedModelError, GenerationError, LoadError
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.serve.history import History
from qwq_mlx.serve.jobs import Failed
from qwq_mlx.serve.server import Server
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.worker import Worker

pytestmark = pytest.mark.tiny

RUNS = "/api/qwq/runs"
LONG = user("x", temperature=1, seed=1)
SHORT = user("x", max_tokens=3)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take 10 ms at least, so that LONG, of 400 tokens, is never over before it is looked at."""
    step = Scheduler.step

    def slow(self: Scheduler) -> Any:
        time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow)


def test_who_leaves_a_stream_frees_the_row(tiny_server: Served) -> None:
    for _ in range(3):
        connection, response = tiny_server.open_stream(LONG)
        response.readline()
        until(lambda: tiny_server.server.worker.n_running == 1)
        connection.close()
        response.close()
        until(lambda: tiny_server.is_idle)
    assert tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3


def test_a_ctrl_c_at_another_process_ends_what_runs_and_not_what_comes_later(
    tiny_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = [True]
    monkeypatch.setattr(ModelRunner, "take_stop", lambda self: bool(asked) and asked.pop())
    assert tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3, "it came while nothing ran"
    connection, response = tiny_server.open_stream(LONG)
    until(lambda: tiny_server.server.worker.n_running == 1)
    asked.append(True)
    assert 0 < response.read().count(b"data: ") < 400
    connection.close()
    assert not asked and tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3


def test_who_leaves_without_a_stream_frees_the_row(tiny_server: Served) -> None:
    connection = tiny_server.connect()
    connection.request("POST", CHAT, json.dumps(LONG))
    until(lambda: tiny_server.server.worker.n_running == 1)
    connection.close()
    until(lambda: tiny_server.is_idle)


def test_the_line_is_bounded_and_tells_the_place(tiny_server: Served) -> None:
    opened = [tiny_server.open_stream(LONG)]
    until(lambda: tiny_server.server.worker.n_running == 1)
    opened += [tiny_server.open_stream(LONG) for _ in range(3)]  # one more row, and two wait: their headers came
    until(lambda: tiny_server.server.worker.n_running == 2)
    status, headers, body = tiny_server.send("POST", CHAT, json.dumps(SHORT).encode())
    assert status == 429 and headers["retry-after"] == "10" and b"at place 3" in body
    assert json.loads(body)["error"]["type"] == "rate_limit_error"
    waiting = opened[-1][1]
    lines = [waiting.readline() for _ in range(4)]
    assert lines[0].startswith(b"data: ") and lines[2] == b": keepalive\n", lines
    for connection, response in opened:
        response.close()
        connection.close()
    until(lambda: tiny_server.is_idle)
    assert tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3


def test_those_who_left_the_line_take_no_memory_behind_one_who_waits(tiny_server: Served) -> None:
    worker = tiny_server.server.worker
    until(lambda: tiny_server.is_idle)
    left_before = worker.counters.left
    opened = [tiny_server.open_stream(LONG) for _ in range(2)]
    until(lambda: worker.n_running == 2)
    opened.append(tiny_server.open_stream(LONG))  # waits, and so do those behind it
    for _ in range(5):
        connection, response = tiny_server.open_stream(SHORT)
        response.close()
        connection.close()
        until(lambda: worker.n_waiting == 1)
    until(lambda: len(worker._line) == 1)
    assert worker.counters.left == left_before + 5, "who never began is counted, too"
    for connection, response in opened:
        response.close()
        connection.close()
    until(lambda: tiny_server.is_idle)


def test_metrics_count_what_ended_and_who_left(tiny_server: Served) -> None:
    def counts() -> dict[str, float]:
        _, headers, raw = tiny_server.send("GET", "/metrics")
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line.split(" ") for line in raw.decode().splitlines() if not line.startswith("#")]
        return {name.removeprefix("qwq_mlx_"): float(value) for name, value in lines}

    until(lambda: tiny_server.is_idle)  # what tests before have left is still counted
    before = counts()
    usage = tiny_server.post(CHAT, SHORT)["usage"]
    connection, response = tiny_server.open_stream(LONG)
    response.readline()
    until(lambda: counts()["running_rows"] == 1)
    connection.close()
    response.close()
    until(lambda: tiny_server.is_idle)
    change = {name: value - before[name] for name, value in counts().items()}
    assert (change["ended_total"], change["left_total"], change["failed_total"]) == (1, 1, 0)
    assert (change["prompt_tokens_total"], change["output_tokens_total"]) == (usage["prompt_tokens"], 3)


@pytest.mark.parametrize("between_s, n_releases", [(0.0, 3), (1e9, 0)])
def test_freed_memory_goes_back_to_the_system_now_and_then(
    tiny_server: Served, monkeypatch: pytest.MonkeyPatch, between_s: float, n_releases: int
) -> None:
    releases: list[None] = []
    monkeypatch.setattr("qwq_mlx.serve.worker._RELEASE_S", between_s)
    monkeypatch.setattr("qwq_mlx.serve.worker.release_freed_memory", lambda: releases.append(None))
    assert tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3
    until(lambda: tiny_server.is_idle)
    assert len(releases) >= n_releases and bool(releases) == bool(n_releases)


def test_more_choices_than_rows_are_refused(tiny_server: Served) -> None:
    error = tiny_server.post(CHAT, {**SHORT, "n": 3}, status=400)["error"]
    assert error["param"] == "n" and "at most 2" in error["message"]


def test_who_waits_for_a_row_gets_signs_of_life_in_its_own_words(tiny_server: Served) -> None:
    opened = [tiny_server.open_stream(LONG) for _ in range(2)]
    until(lambda: tiny_server.server.worker.n_running == 2)
    ollama = {"model": "tiny", **SHORT, "max_tokens": None}
    for path, body, sign in (
        (CHAT, SHORT, b": keepalive"),
        ("/v1/responses", {"input": "x"}, b"response.in_progress"),
        ("/v1/messages", SHORT, b"event: ping"),
        ("/api/chat", ollama, b'"content":""'),
    ):
        connection, response = tiny_server.open_stream(body, path)
        seen = 0
        while seen < 3:  # the first of two of them are how the stream begins
            seen += sign in response.readline()
        response.close()
        connection.close()
    for connection, response in opened:
        response.close()
        connection.close()
    until(lambda: tiny_server.is_idle)


def test_one_body_begins_with_spaces_where_it_takes_long(tiny_server: Served) -> None:
    opened = [tiny_server.open_stream(LONG) for _ in range(2)]
    until(lambda: tiny_server.server.worker.n_running == 2)
    connection = tiny_server.connect()
    connection.request("POST", CHAT, json.dumps(SHORT))
    response = connection.getresponse()  # waits for a row, and has its headers
    assert response.status == 200 and response.read(1) == b" "
    for other, stream in opened:
        stream.close()
        other.close()
    assert json.loads(response.read())["usage"]["completion_tokens"] == 3
    connection.close()


def test_a_save_that_fails_without_a_name_is_told_and_the_next_one_is_made(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A request waited for ever for the file."""
    write = Stream.save

    def fails_once(self: Stream, path: Path) -> None:
        monkeypatch.setattr(Stream, "save", write)
        raise RuntimeError("metal: out of everything")

    monkeypatch.setattr(Stream, "save", fails_once)
    with started(lambda: load(known_checkpoint), Settings(port=0, runs_folder=tmp_path)) as served:
        run = served.post("/api/qwq/runs", {"question": "x", "max_tokens": 2}, status=201)["id"]
        until(lambda: served.get(f"/api/qwq/runs/{run}")["state"] == "ended")
        assert served.send("POST", f"/api/qwq/runs/{run}/save", {})[0] == 500
        assert served.post(f"/api/qwq/runs/{run}/save", {}, status=201)["path"] == str(tmp_path / f"{run}.qwq")


def failure(served: Served, body: Any) -> Any:
    """The error that a request without a stream ends with."""
    status, _, raw = served.send("POST", CHAT, body)
    assert status in (500, 200), "the second where a sign of life went out before, on a busy machine"
    return json.loads(raw)["error"]


def test_one_that_fails_fails_alone(tiny_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Scheduler.step

    def failing(self: Scheduler) -> Any:
        for stream in self.streams:
            if stream.request.sampling.seed == 13 and stream.run.steps:
                stream.fail(GenerationError("step 1: a logit is NaN."))
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)
    answers: list[Any] = []
    other = threading.Thread(target=lambda: answers.append(tiny_server.post(CHAT, user("x", max_tokens=40, seed=2))))
    other.start()
    error = failure(tiny_server, user("x", seed=13))
    assert "a logit is NaN" in error["message"] and error["code"] == "generation_failed"
    other.join()
    assert answers[0]["usage"]["completion_tokens"] == 40
    events = tiny_server.chunks(CHAT, user("x", seed=13))
    assert "a logit is NaN" in events[-1]["error"]["message"]


def test_a_batch_that_fails_once_is_followed_by_a_fresh_one(
    tiny_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failures = Scheduler.step, [ValueError("a fault")]

    def failing(self: Scheduler) -> Any:
        if failures:
            raise failures.pop()
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)
    assert "a fault" in failure(tiny_server, SHORT)["message"]
    assert tiny_server.post(CHAT, SHORT)["usage"]["completion_tokens"] == 3
    assert tiny_server.get("/health")["status"] == "ok"


@pytest.mark.parametrize("error", [DamagedModelError("model.safetensors: a byte is wrong."), ValueError("a fault")])
def test_an_engine_that_stays_broken_says_so_and_ends(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(self: Scheduler) -> Any:
        raise error

    monkeypatch.setattr(Scheduler, "step", failing)
    server = Server(lambda: load(known_checkpoint), Settings(port=0))
    served = Served(server, *server.start(), [])
    until(lambda: server.is_ready)
    for status in [503] if isinstance(error, DamagedModelError) else [500, 500, 500]:
        assert str(error) in served.post(CHAT, SHORT, status=status)["error"]["message"]
    assert server.wait(30) and server.failure is error
    assert server.worker.state == "broken"


def test_health_is_503_while_the_model_loads_and_a_failed_load_ends_the_server(known_checkpoint: Path) -> None:
    may_load = threading.Event()

    def slow() -> Reasoner:
        may_load.wait(30)
        raise LoadError("no weights.")

    server = Server(slow, Settings(port=0))
    served = Served(server, *server.start(), [])
    for method, path, body in (("GET", "/health", None), ("POST", CHAT, SHORT), ("GET", "/v1/models", None)):
        status, _, raw = served.send(method, path, body)
        assert status == 503 and b"loading" in raw
    may_load.set()
    assert server.wait(30)
    assert isinstance(server.failure, LoadError)


def test_a_stop_while_the_model_loads_ends_the_loading() -> None:
    is_loading = threading.Event()

    def load_for_minutes() -> Reasoner:
        try:
            for _ in range(60_000):
                is_loading.set()
                time.sleep(0.01)
        except Exception:  # noqa: BLE001 - as a handler of damaged shards might
            raise AssertionError("the end of the process is no error of loading") from None
        raise AssertionError("nobody ended it")

    server = Server(load_for_minutes, Settings(port=0))
    server.start()
    assert is_loading.wait(30)
    server.stop()
    assert server.wait(30) and server.worker.state == "closed" and server.failure is None


def test_a_stop_lets_running_requests_finish(known_checkpoint: Path) -> None:
    with started(lambda: load(known_checkpoint), Settings(port=0, drain_s=30)) as served:
        with held_steps():
            connection, response = served.open_stream(user("x", max_tokens=60, seed=1))
            until(lambda: served.server.worker.n_running == 1)
            served.server.stop()
        assert served.server.wait(30)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        with pytest.raises(ConnectionRefusedError):
            served.send("GET", "/health")


def test_what_is_not_finished_within_the_drain_is_cut(known_checkpoint: Path) -> None:
    with started(lambda: load(known_checkpoint), Settings(port=0, drain_s=1)) as served:
        connection, response = served.open_stream(LONG)
        until(lambda: served.server.worker.n_running == 1)
        served.server.stop()
        assert served.server.wait(30)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        connection.close()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_stop_lets_runs_that_nobody_reads_finish(known_checkpoint: Path, tmp_path: Path, is_kept: bool) -> None:
    history = History(tmp_path / "h", max_bytes=1 << 20) if is_kept else None
    with started(lambda: load(known_checkpoint), Settings(port=0), history=history) as served:
        with held_steps():
            served.post(RUNS, {"question": "x", "max_tokens": 8}, status=201)
            served.server.stop()
        assert served.server.wait(30)
    [run] = served.server._runs
    assert (run.state, len(run.steps), run.is_kept) == ("ended", 8, is_kept)


@pytest.mark.parametrize("has_folder", [True, False])
def test_runs_that_are_not_over_within_the_drain_are_saved_or_told_to_be_lost(
    known_checkpoint: Path, tmp_path: Path, has_folder: bool
) -> None:
    settings = Settings(port=0, width=1, drain_s=0.1, runs_folder=tmp_path if has_folder else None)
    with started(lambda: load(known_checkpoint), settings) as served:
        body = {"question": "x", "temperature": 1, "seed": 1, "max_tokens": 100}
        first, second = (served.post(RUNS, body, status=201)["id"] for _ in range(2))
        until(lambda: served.get(f"{RUNS}/{first}")["tokens"] > 3)
        served.server.stop()
    told = {run: [line for line in served.log if f"{run} is " in line] for run in (first, second)}
    assert "lost after 0 tokens" in told[second][0] and ("has not begun" in told[second][0]) is has_folder
    if not has_folder:
        assert "is lost after" in told[first][0] and "`runs_folder`" in told[first][0]
        return
    path = tmp_path / f"{first}.qwq"
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and str(path) in told[first][0]
    reasoner = load(known_checkpoint)
    whole = reasoner.generate("x", sampling=Sampling(temperature=1, seed=1), limits=Limits(max_tokens=100))
    assert tuple(step.id for step in reasoner.resume(path)) == whole.ids


def test_an_abort_ends_the_models_thread_in_the_midst_of_a_request(known_checkpoint: Path) -> None:
    """One that is left in MLX when the interpreter goes ends the process by SIGABRT instead of the exit code."""
    with started(lambda: load(known_checkpoint), Settings(port=0)) as served:
        connection, response = served.open_stream(LONG)
        until(lambda: served.server.worker.n_running == 1)
        served.server.abort()
        assert served.server.worker.state == "closed"
        response.close()
        connection.close()


class WaitingJob:
    """A job in the line. Reading `is_cancelled` lets another thread, `meanwhile`, run first, unless a lock stops it."""

    n_choices = 1

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.meanwhile: threading.Thread | None = None

    @property
    def is_cancelled(self) -> bool:
        other, self.meanwhile = self.meanwhile, None
        if other is not None:
            other.start()
            other.join(0.05)  # not longer: the lock that it waits for may be held here
        return False

    def emit(self, event: Any) -> None:
        self.events.append(event)


@pytest.fixture
def idle_worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker whose thread does not run: the tests are its thread."""
    worker = Worker(lambda: pytest.fail("loaded"), Settings(port=0))
    monkeypatch.setattr(worker, "_preparer", object())
    worker.state = "ready"
    return worker


def test_the_line_may_be_counted_while_jobs_leave_it(idle_worker: Worker) -> None:
    first, second = WaitingJob(), WaitingJob()
    for job in (first, second):
        idle_worker.submit(job)  # type: ignore[arg-type]
    rows: Any = SimpleNamespace(n_busy=0, has_room=lambda job: True, start=lambda job: None)
    admission = first.meanwhile = threading.Thread(target=lambda: idle_worker._admit(rows))
    assert idle_worker.n_waiting == 2
    admission.join()
    assert idle_worker.n_waiting == 0


def test_a_job_that_comes_while_the_worker_ends_is_told(idle_worker: Worker) -> None:
    first, late = WaitingJob(), WaitingJob()
    idle_worker.submit(first)  # type: ignore[arg-type]

    def end() -> None:
        idle_worker.state = "closed"
        idle_worker._end_all(None)

    ending = first.meanwhile = threading.Thread(target=end)
    idle_worker.submit(late)  # type: ignore[arg-type]
    ending.join()
    assert [type(event) for job in (first, late) for event in job.events] == [Failed, Failed]
