"""Runs in a file: what a killed server leaves goes on with the ids it would have had, and what is deleted is gone."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import QUESTION, Served, held_steps, started, until

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.user_folders import user_data_folder
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.serve import history as module
from qwq_mlx.serve.history import History, KeptRun
from qwq_mlx.serve.settings import Settings
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.pocket

RUNS = "/api/qwq/runs"
LONG = "Add one pair of parentheses to make this equation true: 4 + 5 * 6 - 1 * 7 = 39"
BODY = {"question": LONG, "temperature": 0.9, "seed": 11, "alternatives": 2, "max_tokens": 100}


@pytest.fixture(scope="module")
def trace(pocket_reasoner: Reasoner) -> Trace:
    """What BODY comes to."""
    limits = Limits(max_tokens=100)
    return pocket_reasoner.generate(LONG, sampling=Sampling(temperature=0.9, seed=11), limits=limits)


@contextmanager
def serving(path: Path, *, folder: Path | None = None) -> Iterator[Served]:
    """A server of the pocket model that keeps its runs in this file."""
    settings = Settings(port=0, name="pocket", runs_folder=folder)
    with started(lambda: load(pocket_checkpoint()), settings, history=History(path, max_bytes=1 << 20)) as served:
        yield served


def copied(path: Path, name: str) -> Path:
    """The file as a process leaves it that is killed now: what it wrote is there, and nothing is closed."""
    folder = path.with_name(name)
    folder.mkdir()
    for each in path.parent.glob(f"{path.name}*"):
        shutil.copy(each, folder / each.name)
    return folder / path.name


def steps(served: Served, run_id: str) -> tuple[list[Any], Any]:
    status, _, raw = served.send("GET", f"{RUNS}/{run_id}/steps")
    assert status == 200
    lines = [json.loads(line) for line in raw.splitlines() if line]
    return lines[:-1], lines[-1]["run"]


def test_a_killed_server_leaves_finished_runs_whole_and_others_to_go_on(
    tmp_path: Path, trace: Trace, pocket_reasoner: Reasoner
) -> None:
    path = tmp_path / "history.sqlite3"
    with serving(path) as served:
        ended = served.post(RUNS, {"question": QUESTION, "temperature": 0}, status=201)["id"]
        whole = steps(served, ended)
        with held_steps() as allow:
            going = served.post(RUNS, BODY, status=201)["id"]
            allow(12)  # one for the prompt
            until(lambda: served.get(f"{RUNS}/{going}")["tokens"] == 11)
            served.get(RUNS)  # is answered behind what is still to be written: no file changes while it is copied
            left = copied(path, "killed")
            served.send("DELETE", f"{RUNS}/{going}")
    with serving(left) as served:
        assert [(each["id"], each["state"]) for each in served.get(RUNS)["runs"]] == [
            (going, "interrupted"),
            (ended, "ended"),
        ]
        assert steps(served, ended) == whole
        assert served.get(f"{RUNS}/{going}")["can_resume"]
        assert served.post(f"{RUNS}/{going}/resume", {}, status=201)["state"] == "running"
        got, run = steps(served, going)
        assert [step["id"] for step in got] == list(trace.ids) and run["summary"]["answer"] == trace.answer
        assert all(len(step["alternatives"]) == 2 for step in got)
        assert "has ended (stop)" in served.post(f"{RUNS}/{ended}/resume", {}, status=409)["error"]
        # a fork of a run that another process wrote
        forked = served.post(f"{RUNS}/{ended}/fork", {"at": 5, "seed": 9}, status=201)["id"]
        got, run = steps(served, forked)
        source = pocket_reasoner.stream(QUESTION, sampling=Sampling(temperature=0))
        for _ in range(6):
            next(source)
        alone = [step.id for step in source.fork(at=5, seed=9)]
        assert [step["id"] for step in got][5:] == alone and got[:5] == whole[0][:5]
        assert run["parent"] == {"id": ended, "at": 5}


def test_a_run_is_stopped_resumed_cut_and_resumed(tmp_path: Path, trace: Trace) -> None:
    with serving(tmp_path / "h", folder=tmp_path) as served:
        with held_steps() as allow:
            run = served.post(RUNS, {**BODY, "max_tokens": 30}, status=201)["id"]
            assert served.post(f"{RUNS}/{run}/stop", {})["state"] == "stopped", "before it has begun"
            allow(10)
            served.post(f"{RUNS}/{run}/resume", {}, status=201)
            until(lambda: served.get(f"{RUNS}/{run}")["tokens"] > 3)
            assert served.post(f"{RUNS}/{run}/stop", {})["state"] == "stopped"
            assert "over" in served.post(f"{RUNS}/{run}/answer-now", {}, status=409)["error"]
            served.post(f"{RUNS}/{run}/resume", {}, status=201)
            assert "goes on already" in served.post(f"{RUNS}/{run}/resume", {}, status=409)["error"]
        got, ended = steps(served, run)
        assert [step["id"] for step in got] == list(trace.ids[:30]) and ended["can_resume"]
        assert "max_tokens is 30" in served.post(f"{RUNS}/{run}/resume", {}, status=400)["error"]
        served.post(f"{RUNS}/{run}/save", {}, status=201)
        served.post(f"{RUNS}/{run}/resume", {"max_tokens": 100}, status=201)  # from the file, with its cache
        got, ended = steps(served, run)
        assert [step["id"] for step in got] == list(trace.ids) and ended["max_tokens"] == 100
        assert served.send("DELETE", f"{RUNS}/{run}")[0] == 204
        assert served.get(RUNS)["runs"] == []
        # the file is still there, and knows all that is needed
        resumed = served.post(f"{RUNS}/{run}/resume", {"max_tokens": 40, "answer_now": True}, status=201)
        assert resumed["id"] == run and resumed["question"] == LONG
        got, ended = steps(served, run)
        assert [step["id"] for step in got[:30]] == list(trace.ids[:30])
        assert ended["summary"]["injections"][0]["start"] == 30
        assert served.send("POST", f"{RUNS}/run-0/resume", b"{}")[0] == 404
        assert served.send("POST", f"{RUNS}/..%2Fh/resume", b"{}")[0] == 404


def test_a_run_of_another_model_is_refused(tmp_path: Path, known_checkpoint: Path) -> None:
    history = History(tmp_path / "h", max_bytes=1 << 20)
    history.write(kept("run-1", "stopped"), start=0, lines=[])
    with started(lambda: load(known_checkpoint), Settings(port=0), history=history) as served:
        assert "written by another model" in served.post(f"{RUNS}/run-1/resume", {}, status=409)["error"]
        assert "written by another model" in served.post(f"{RUNS}/run-1/fork", {"at": 0}, status=409)["error"]


def kept(run_id: str, state: str, *, created: float = 0.0, text: str = "") -> KeptRun:
    """A run without what the history does not look at."""
    info = {
        "id": run_id,
        "state": state,
        "created": created,
        "question": text,
        "parent": None,
        "group": None,
        "summary": None,
        "error": None,
    }
    return KeptRun(info=info, model="a", request={"settings": {}})


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "data" / "h.sqlite3", max_bytes=1_000)
    yield history
    history.close()


def ids(history: History) -> list[str]:
    return [each["id"] for each in history.infos(limit=100)]


def test_steps_are_kept_in_pieces_and_those_that_are_written_again_replace_the_first(history: History) -> None:
    lines = [b'{"index":%d}\n' % index for index in range(9)]
    history.write(kept("a", "running"), start=0, lines=lines[:4])
    history.write(kept("a", "running"), start=4, lines=lines[4:8])
    assert history.find("a") == (kept("a", "running"), lines[:8])
    history.write(kept("a", "running"), start=2, lines=[b"2\n", b"3\n"])
    assert history.find("a") == (kept("a", "running"), [*lines[:2], b"2\n", b"3\n"])
    history.write(kept("a", "ended"), start=0, lines=lines)
    assert history.find("a") == (kept("a", "ended"), lines) and history.find("b") is None


def test_the_oldest_that_have_ended_make_room(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, state in enumerate(("running", "ended", "ended", "stopped")):
        history.write(kept(f"run-{number}", state, created=number, text="x" * 300), start=0, lines=[])
    assert ids(history) == ["run-3", "run-0"], "about 400 bytes each, and what goes on stays"
    monkeypatch.setattr(module, "MAX_RUNS", 1)
    history.write(kept("run-4", "running", created=4), start=0, lines=[])
    assert ids(history) == ["run-4", "run-0"]


def test_what_is_deleted_is_in_no_file_and_the_file_is_the_users_alone(history: History, tmp_path: Path) -> None:
    history.write(kept("a", "ended", text="a secret question"), start=0, lines=[])
    folder = tmp_path / "data"
    assert any(b"a secret question" in path.read_bytes() for path in folder.iterdir())
    history.remove("a")
    assert not any(b"a secret question" in path.read_bytes() for path in folder.iterdir())
    assert stat.S_IMODE((folder / "h.sqlite3").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_that_is_no_history_is_refused(history: History, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is writing it"):
        History(tmp_path / "data" / "h.sqlite3", max_bytes=1)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "h.sqlite3")
    with pytest.raises(OptionError, match="is writing it"):
        History(tmp_path / "link", max_bytes=1)
    (tmp_path / "text").write_text("not a database, but long enough to be taken for a header of one" * 20)
    with pytest.raises(OptionError, match="cannot be used"):
        History(tmp_path / "text", max_bytes=1)
    with pytest.raises(OptionError, match="cannot be made"):
        History(tmp_path / "text" / "h", max_bytes=1)
    other = sqlite3.connect(tmp_path / "other")
    other.executescript("CREATE TABLE notes (text); PRAGMA user_version = 7")
    other.close()
    for _ in range(2):  # the lock is given back
        with pytest.raises(OptionError, match="schema 7, expected 1"):
            History(tmp_path / "other", max_bytes=1)


def damage(history: History, sql: str) -> None:
    history._connection.execute(sql)


def test_a_damaged_entry_is_told_hides_no_other_and_can_be_deleted(history: History) -> None:
    for run_id in "abcd":
        history.write(kept(run_id, "ended"), start=0, lines=[b"0\n"])
        history.write(kept(run_id, "ended"), start=1, lines=[b"1\n"])
    damage(history, "UPDATE runs SET info = '[' WHERE id = 'a'")
    damage(history, "UPDATE steps SET lines = x'00' WHERE run = 'b'")
    damage(history, "DELETE FROM steps WHERE run = 'c' AND start = 0")
    assert ids(history) == ["b", "c", "d"]
    for run_id in "abc":
        with pytest.raises(SourceError, match=f"entry of {run_id} is damaged"):
            history.find(run_id)
        assert history.remove(run_id) and not history.remove(run_id)
    assert history.find("d") == (kept("d", "ended"), [b"0\n", b"1\n"])


def test_a_server_tells_what_is_damaged_and_a_run_whose_end_was_never_written(
    known_checkpoint: Path, tmp_path: Path
) -> None:
    history = History(tmp_path / "h", max_bytes=1 << 20)
    with started(lambda: load(known_checkpoint), Settings(port=0), history=history) as served:
        for run_id in ("run-1", "run-2", "run-3", "run-4"):
            history.write(replace(kept(run_id, "running"), model=served.server.worker.card.identity), start=0, lines=[])
        damage(history, "UPDATE runs SET info = '{}' WHERE id = 'run-2'")
        damage(history, "UPDATE runs SET request = '{}' WHERE id = 'run-3'")
        damage(history, """UPDATE runs SET progress = '{"n_steps": 3}' WHERE id = 'run-4'""")
        for run_id in ("run-2", "run-4"):
            status, _, raw = served.send("GET", f"{RUNS}/{run_id}")
            assert status == 500 and b"is damaged" in raw
        assert "is damaged" in served.post(f"{RUNS}/run-3/resume", {}, status=409)["error"]
        assert served.get(f"{RUNS}/run-1")["state"] == "interrupted"
        assert steps(served, "run-1")[1]["can_resume"], "nobody waits for a job that is not there"
        for run_id in ("run-2", "run-3"):
            assert [served.send("DELETE", f"{RUNS}/{run_id}")[0] for _ in range(2)] == [204, 404]
        assert [(each["id"], each["state"]) for each in served.get(RUNS)["runs"]] == [
            ("run-1", "interrupted"),
            ("run-4", "interrupted"),
        ]
        damage(history, "DROP TABLE steps")
        damage(history, "DROP TABLE runs")
        for method, path in (("GET", RUNS), ("GET", f"{RUNS}/run-9"), ("DELETE", f"{RUNS}/run-1")):
            status, _, raw = served.send(method, path)
            assert status == 500 and b"The history failed" in raw
        assert not any("internal error" in line for line in served.log)


def test_a_run_that_goes_on_after_the_history_made_room_is_written_whole(
    known_checkpoint: Path, tmp_path: Path
) -> None:
    history = History(tmp_path / "h", max_bytes=1 << 20)
    with started(lambda: load(known_checkpoint), Settings(port=0), history=history) as served:
        run = served.post(RUNS, {"question": "x", "max_tokens": 4}, status=201)["id"]
        before, _ = steps(served, run)
        history.remove(run)  # as `_make_room` does
        with held_steps():  # so that no other thread writes while this one reads
            served.post(f"{RUNS}/{run}/resume", {"max_tokens": 400}, status=201)
            found = history.find(run)
        assert found is not None and [json.loads(line) for line in found[1][: len(before)]] == before
        served.send("DELETE", f"{RUNS}/{run}")


def test_a_disk_that_takes_no_more_costs_a_warning(known_checkpoint: Path, tmp_path: Path) -> None:
    history = History(tmp_path / "h", max_bytes=1 << 20)
    with started(lambda: load(known_checkpoint), Settings(port=0), history=history) as served:
        history._connection.execute("PRAGMA query_only = ON")  # every write fails as on a full disk
        for _ in range(2):
            run = served.post(RUNS, {"question": "x", "max_tokens": 2}, status=201)["id"]
            assert steps(served, run)[1]["state"] == "ended"
            assert run in [each["id"] for each in served.get(RUNS)["runs"]]
        assert sum("runs are not kept" in line for line in served.log) == 1


def test_the_data_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_data_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/qwq-mlx")
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_data_folder({}) == Path.home() / "Library/Application Support/qwq-mlx"
    monkeypatch.setattr("sys.platform", "linux")
    assert user_data_folder({}) == Path.home() / ".local/share/qwq-mlx"
