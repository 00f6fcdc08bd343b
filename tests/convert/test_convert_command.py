"""The command: what goes where, exit codes, and that a wrong word costs one message and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_disk import FaultyDisk

from qwq_mlx.convert import ConvertProgress, __main__, convert_checkpoint
from qwq_mlx.convert.__main__ import main
from qwq_mlx.convert.plan_text import duration_text, size_text
from qwq_mlx.errors import RecipeError


def run(*arguments: object, module: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).resolve().parent.parent.parent
    command = ["-m", "qwq_mlx.convert"] if module else [str(repository / "scripts" / "convert.py")]
    return subprocess.run(
        [sys.executable, "-W", "error", *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd or repository,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_the_script_converts_from_anywhere_and_prints_the_plan_on_stderr_and_the_result_on_stdout(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run("--source", tiny_checkpoint, "--output", "out dir", "--no-quality", module=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "27 tensors, 328,832 weights in BF16" in done.stderr
    assert "qwq-32b-preview-4bit: affine, 4 bits, groups of 64, least-squares" in done.stderr
    assert "4.540 bits per weight" in done.stderr and "done: " not in done.stderr
    assert "4.540 bits per weight" in done.stdout and "relative error 8." in done.stdout
    assert (tmp_path / "out dir" / "manifest.json").is_file()
    assert "\r" not in done.stderr and "\x1b" not in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(tiny_checkpoint), "--output", str(tmp_path / "a" / "out"), "--dry-run"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "bits per weight" in out and "GB free" in out and out.endswith("dry run: nothing was written\n")
    assert err.startswith("warning: the chat template (sha256 ") and err.count("\n") == 1  # before hours are spent
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["is_written"] is False and result["relative_error"] is None
    assert list(tmp_path.iterdir()) == []
    assert convert_checkpoint(tiny_checkpoint, tmp_path / "out").output_bytes == result["output_bytes"]


def test_a_full_disk_exits_with_3_before_the_first_byte_and_in_the_middle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--no-quality"]
    with monkeypatch.context() as patch:
        patch.setattr("qwq_mlx.convert.preflight._MARGIN", 1e12)
        assert main(arguments) == 3
        assert "more on its disk" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    with FaultyDisk(tmp_path, at=12, kind="full"):
        assert main(arguments) == 3
    assert "the disk is full: writing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0


def test_the_plan_is_exact(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny_checkpoint, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "manifest.json")
    assert result.output_bytes == written


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "none", "--output", "out"], 1, "error: none: there is no such folder"),
        (["--source", ".", "--output", "out", "--recipe", "7bit"], 2, "error: There is no recipe '7bit'. Recipes: "),
        (["--source", ".", "--output", "out", "--workers", "0"], 2, "error: --workers is 0, expected"),
    ],
)
def test_failures_are_one_message_with_the_right_code(
    arguments: list[str],
    code: int,
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    arguments = ["../out" if each == "out" else each for each in arguments]
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--source", "a"],
        ["--source", "a", "--output", "b", "--dry"],
        ["--source", "a", "--output", "b", "--output", "c"],
        ["--source", "a", "--output", "b", "--recipe", "4bit", "--recipe", "4bit"],
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m qwq_mlx.convert" in capsys.readouterr().err


def test_help_imports_nothing_heavy(repository: Path) -> None:
    script = (
        "import sys; from qwq_mlx.convert.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('numpy', 'mlx', 'mlx_lm', 'transformers', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.endswith("[]\n") and "--dry-run" in done.stdout and "qwq-32b-preview-4bit" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_what_is_kept_and_the_same_command_finishes(
    number: signal.Signals,
    code: int,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--source", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--json"]
    handler = signal.getsignal(signal.SIGTERM)

    def press(progress: ConvertProgress, bar: object) -> None:
        if progress.done_bytes > 0.5 * progress.total_bytes:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(__main__, "_show_progress", press)
        assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and f"interrupted: what is finished is kept in {tmp_path}/out.partial. Run the same command" in err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["resumed_bytes"] > 0


def test_an_interruption_before_anything_was_written_says_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "_show_plan", press)
    assert main(["--source", str(tiny_checkpoint), "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was kept.\n"


def test_quiet_leaves_warnings_and_errors_alone(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    shard = source / "model-00002-of-00002.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-8192] + bytes(8192))
    assert main(["--source", str(source), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: the chat template (sha256 ") and err.count("\n") == 2
    assert f"\nwarning: {shard.name}: lm_head.weight has 2 pages" in err
    assert out.startswith("done: ")


def test_progress_names_the_phase_what_was_fetched_and_the_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    step = ConvertProgress(phase="convert", what="lm_head.weight", done_bytes=3, total_bytes=9, fetched_bytes=5 * 10**9)
    shown: list[tuple[object, ...]] = []
    bar = SimpleNamespace(show=lambda *values, n_before, note: shown.append((*values, n_before, note)))
    __main__._show_progress(replace(step, resumed_bytes=2), bar)
    __main__._show_progress(ConvertProgress(phase="check", what="model", done_bytes=0, total_bytes=90), bar)
    assert shown == [
        ("converting", 3, 9, 2, "5.00 GB fetched, lm_head.weight"),
        ("reading back", 0, 90, 0, "model"),
    ]


def test_sizes_and_durations_read_as_people_write_them() -> None:
    assert [size_text(n) for n in (999, 1000, 65_527_752_704)] == ["999 bytes", "1.00 kB", "65.53 GB"]
    assert [duration_text(s) for s in (0.4, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


def test_the_room_exports_what_it_says() -> None:
    import qwq_mlx.convert as room

    assert {name: getattr(room, name).__name__ for name in room.__all__} == {name: name for name in room.__all__}
    with pytest.raises(AttributeError, match=r"'qwq_mlx\.convert' has no attribute 'nothing'"):
        room.nothing  # noqa: B018


def test_a_recipe_error_is_a_usage_error() -> None:
    from qwq_mlx.errors import OptionError

    assert issubclass(RecipeError, OptionError)
