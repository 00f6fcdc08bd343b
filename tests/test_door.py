"""What `import qwq_mlx` gives, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qwq_mlx

IMPORT_SILENCE = """
import os, resource, signal, sys, threading
import locale
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return (dict(os.environ), threading.active_count(), resource.getrlimit(resource.RLIMIT_NOFILE), handlers,
            sys.getrecursionlimit(), os.getcwd(), locale.setlocale(locale.LC_ALL), list(sys.path), sys.excepthook)
before = state()
import qwq_mlx
assert state() == before
heavy = {"mlx", "mlx_lm", "transformers", "torch", "numpy", "tokenizers", "huggingface_hub", "httpx2"}
heavy &= set(sys.modules)
assert not heavy, heavy
dir(qwq_mlx)
from qwq_mlx import Limits, QwqError, Sampling
assert not {"mlx_lm", "transformers"} & set(sys.modules)
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_importing_changes_nothing_and_loads_nothing_heavy() -> None:
    done = _run("-c", IMPORT_SILENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert sorted(qwq_mlx.__all__) == qwq_mlx.__all__
    assert set(qwq_mlx.__all__) <= set(dir(qwq_mlx))
    for name in qwq_mlx.__all__:
        assert getattr(qwq_mlx, name).__name__ == name


def test_no_name_hides_a_room(repository: Path) -> None:
    rooms = {path.name for path in (repository / "qwq_mlx").iterdir() if path.is_dir()}
    assert not rooms.intersection(qwq_mlx.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qwq_mlx' has no attribute 'lod'"):
        getattr(qwq_mlx, "lod")  # noqa: B009


def test_every_error_is_exported_and_is_a_qwq_error() -> None:
    from qwq_mlx import errors

    for name in errors.__all__:
        assert issubclass(getattr(qwq_mlx, name), qwq_mlx.QwqError)


def test_the_list_of_commands_names_every_command(repository: Path) -> None:
    done = _run("-m", "qwq_mlx")
    commands = [path.parent.name for path in (repository / "qwq_mlx").glob("*/__main__.py")]
    assert done.returncode == 0
    assert "convert" in commands
    for command in commands:
        purpose = next(line for line in done.stdout.splitlines() if line.split()[:1] == [command])
        assert len(purpose.split()) > 3


def test_a_command_runs_through_the_list_with_its_own_exit_code() -> None:
    done = _run("-m", "qwq_mlx", "generate", "--temp", "-1", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--temp" in done.stderr
    assert _run("-m", "qwq_mlx", "convert", "--help").returncode == 0


def test_an_unknown_command_is_refused_by_name() -> None:
    done = _run("-m", "qwq_mlx", "convrt")
    assert done.returncode == 2
    assert "there is no command 'convrt', expected one of" in done.stderr
