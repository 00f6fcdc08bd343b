"""A child with limits: what it is asked reaches it, each limit ends it, and one child answers many requests."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwq_mlx.files import limited_child as module
from qwq_mlx.files.limited_child import LimitedForkServer, run_limited

MEMORY = 256 << 20


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_the_request_is_read_and_the_result_comes_back(script: Path) -> None:
    script.write_text(
        "import json, sys\n"
        "assert __name__ == '__main__' and sys.flags.isolated\n"
        "print(json.load(sys.stdin)['text'])\n"
        "sys.exit(3)\n"
    )
    done = run_limited(script, {"text": "one"}, cpu_s=5, memory_bytes=MEMORY, wall_s=60)
    assert done is not None and (done.returncode, done.stdout, done.stderr) == (3, b"one\n", b"")


def test_what_computes_too_long_is_ended_by_the_system(script: Path) -> None:
    script.write_text("while True: pass\n")
    done = run_limited(script, {}, cpu_s=1, memory_bytes=MEMORY, wall_s=120)
    assert done is not None and done.returncode == -signal.SIGXCPU


def test_what_takes_too_much_memory_fails(script: Path) -> None:
    script.write_text(f"bytearray({MEMORY})\n")
    done = run_limited(script, {}, cpu_s=5, memory_bytes=MEMORY, wall_s=60)
    assert done is not None and done.returncode == 1 and done.stderr.endswith(b"MemoryError\n")


def test_what_waits_too_long_is_ended(script: Path) -> None:
    script.write_text("import time\ntime.sleep(600)\n")
    assert run_limited(script, {}, cpu_s=5, memory_bytes=MEMORY, wall_s=0.5) is None


@pytest.fixture
def server(script: Path) -> Iterator[LimitedForkServer]:
    script.write_text(
        "import os, signal\n"
        "calls = []\n"
        "def answer(request):\n"
        "    calls.append(request)\n"
        "    if 'code' in request:\n"
        "        exec(request['code'])\n"
        "    return request.get('text', repr((len(calls), os.getppid()))).encode()\n"
    )
    one = LimitedForkServer(script)
    yield one
    one.close()


Answer = subprocess.CompletedProcess[bytes] | None


def asked(server: LimitedForkServer, code: str = "", *, wall_s: float = 60) -> Answer:
    return server.ask({"code": code}, cpu_s=1, memory_bytes=MEMORY, wall_s=wall_s)


def parent(server: LimitedForkServer) -> int:
    """The process id of the child that answers; nothing that was called before may be left in it."""
    done = asked(server)
    assert done is not None and (done.returncode, done.stderr) == (0, b"")
    n_calls, pid = ast.literal_eval(done.stdout.decode())
    assert n_calls == 1
    return int(pid)


def test_one_child_answers_many_requests_and_keeps_nothing_of_them(server: LimitedForkServer) -> None:
    assert len({parent(server) for _ in range(5)}) == 1
    for _ in range(3):  # together more than one request may use
        done = asked(server, f"request['text'] = str(len(bytearray({MEMORY // 2})))")
        assert done is not None and done.returncode == 0
    large = "x" * (1 << 20)  # more than a pipe holds
    done = server.ask({"text": large}, cpu_s=1, memory_bytes=MEMORY, wall_s=60)
    assert done is not None and large.encode() in done.stdout


@pytest.mark.parametrize(
    ("code", "returncode", "last_line"),
    [
        ("while True: pass", -signal.SIGXCPU, b""),
        (f"bytearray({MEMORY})", 1, b"MemoryError\n"),
        ("raise ValueError('x' * 100_000 + 'é')", 1, b"xx\xc3\xa9\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, b""),
        ("os._exit(0)", 1, b""),
    ],
)
def test_a_request_that_fails_is_told_as_it_ended_and_the_next_is_answered(
    server: LimitedForkServer, code: str, returncode: int, last_line: bytes
) -> None:
    before = parent(server)
    done = asked(server, code)
    assert done is not None and (done.returncode, done.stdout) == (returncode, b"")
    assert done.stderr.endswith(last_line) and bool(done.stderr) == bool(last_line)
    assert (parent(server) == before) is bool(last_line), "what says how it failed is no reason for another child"


def test_a_request_that_waits_too_long_is_ended_with_its_fork(server: LimitedForkServer, tmp_path: Path) -> None:
    parent(server)
    pid = tmp_path / "pid"
    code = f"import pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    assert asked(server, code, wall_s=1.0) is None
    while is_running(int(pid.read_text())):  # the signal is sent; the runner's time-out ends a wait for nothing
        time.sleep(0.01)
    parent(server)


def test_a_child_that_somebody_ended_is_started_again(server: LimitedForkServer) -> None:
    before, child = parent(server), server._child
    assert child is not None
    child.kill()
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert parent(server) != before


def test_a_child_that_ends_while_a_request_is_on_its_way_is_asked_again(
    server: LimitedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = parent(server), module._exchange

    def ended_idle(child: subprocess.Popen[bytes], line: bytes) -> Answer:
        monkeypatch.setattr(module, "_exchange", real)
        child.send_signal(signal.SIGALRM)
        return real(child, line)

    monkeypatch.setattr(module, "_exchange", ended_idle)
    assert parent(server) != before


def test_a_wait_that_is_interrupted_leaves_no_answer_for_the_next_request(
    server: LimitedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(child: subprocess.Popen[bytes], line: bytes) -> None:
        assert child.stdin is not None
        child.stdin.write(line)
        child.stdin.flush()
        raise KeyboardInterrupt

    before = parent(server)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked(server)
    assert parent(server) != before


def is_running(pid: int) -> bool:
    """A killed orphan may wait for init to reap it, or be gone."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
