"""A child with limits: what it is asked reaches it, and each limit ends it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from qwq_mlx.files.limited_child import run_limited

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
