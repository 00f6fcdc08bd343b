"""`python -m qwq_mlx.serve`: flags, what is loaded when, signals and exit codes."""

from __future__ import annotations

import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import held_steps, until

from qwq_mlx.serve import __main__ as command
from qwq_mlx.serve.server import Server

pytestmark = pytest.mark.tiny


@pytest.fixture(autouse=True)
def no_history_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the default place is a test's own."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder / "qwq-mlx" / "history.sqlite3"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "which others can reach"),
        (["--host", "192.168.1.1", "--api-key", " "], "--api-key is empty"),
        (["--api-key", "x", "--api-key-file", "y"], "exclude each other"),
        (["--api-key-file", "/nowhere/key"], "--api-key-file /nowhere/key: cannot be read"),
        (["--port", "70000"], "--port is 70000"),
        (["--width", "0"], "--width is 0"),
        (["--drain", "0"], "expected seconds above 0"),
        (["--context", "1"], "--context is 1"),
        (["--history", "/dev/null/h"], "/dev/null cannot be made"),
        (["--history", "x", "--no-history"], "exclude each other"),
        (["--history-bytes", "0"], "--history-bytes is 0"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(
    flags: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main(flags) == 2
    assert said in capfd.readouterr().err


def test_a_port_that_is_taken_is_told(
    tiny_server: object, known_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = tiny_server.port  # type: ignore[attr-defined]
    assert command.main(["--model", str(known_checkpoint), "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} cannot be listened on" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "none" in capfd.readouterr().err


def run(arguments: list[str], meanwhile: Callable[[Server], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command's exit code; `meanwhile` runs beside it once the model is loaded."""
    start = Server.start
    threads: list[threading.Thread] = []

    def noted(self: Server) -> tuple[str, int]:
        self.address = start(self)  # type: ignore[attr-defined]

        def wait() -> None:
            until(lambda: self.is_ready)
            meanwhile(self)

        threads.append(threading.Thread(target=wait))
        threads[0].start()
        return self.address  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(Server, "start", noted)
    code = command.main(arguments)
    threads[0].join()
    return code


def test_a_signal_lets_a_request_finish_and_ends_with_0(
    known_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("secret\n")
    answers: list[bytes] = []

    def ask(server: Server) -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=30)  # type: ignore[attr-defined]
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": "Bearer secret"})
        with held_steps():
            response = connection.getresponse()
            until(lambda: server.worker.n_running == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server._http._server.should_exit)
        answers.append(response.read())
        connection.close()

    arguments = ["--model", str(known_checkpoint), "--port", "0", "--api-key-file", str(tmp_path / "key")]
    assert run(arguments, ask, monkeypatch) == 0
    assert answers[0].endswith(b"data: [DONE]\n\n")
    notes = capfd.readouterr().err
    assert "http://127.0.0.1:" in notes and "POST '/v1/chat/completions' 200 " in notes and "secret" not in notes


@pytest.fixture
def nothing_is_frozen() -> Iterator[None]:
    """What is imported is, by `conftest`; later tests find it so again."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_is_frozen")
def test_python_looks_for_cycles_among_the_objects_of_requests_alone(
    known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(server: Server) -> None:
        until(lambda: gc.get_freeze_count() > len(gc.get_objects()))
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(["--model", str(known_checkpoint), "--port", "0"], look, monkeypatch) == 0


def test_a_second_signal_ends_at_once(known_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(server: Server) -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=30)  # type: ignore[attr-defined]
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        with held_steps():
            response = connection.getresponse()
            until(lambda: server.worker.n_running == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server._http._server.should_exit)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server._http._server.force_exit)
        until(lambda: server.wait(1))
        response.close()
        connection.close()

    assert run(["--model", str(known_checkpoint), "--port", "0"], ask, monkeypatch) == 143


def test_the_http_side_is_imported_without_mlx() -> None:
    """In a process of its own: this one has MLX."""
    code = "import sys, qwq_mlx.serve.server; print(sorted({'mlx.core', 'mlx_lm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
