"""A conversion whose bytes changed is used: every flipped bit is named, and no answer of it passes for one."""

from __future__ import annotations

import random
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import qwq_mlx
from qwq_mlx.chat import __main__ as chat
from qwq_mlx.errors import DamagedModelError
from qwq_mlx.files.background_verification import BackgroundVerification
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.generate import __main__ as generate
from qwq_mlx.options import Limits, Sampling

pytestmark = pytest.mark.tiny
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    qwq_mlx.convert_checkpoint(tiny_checkpoint, folder, quality=False)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def flip(folder: Path, position: float, bit: int) -> str:
    """Flip one bit at a share of the tensors' bytes; returns the name of the tensor."""
    places = sorted((entry.start, entry.end, shard.path, name) for name, (shard, entry) in _tensors(folder))
    start, end, path, name = places[int(position * len(places))]
    at = start + int(position * 997) % (end - start)
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
    return name


def _tensors(folder: Path):  # type: ignore[no-untyped-def]
    return open_checkpoint(folder).tensors.items()


def ask(folder: Path, *flags: str) -> int:
    return generate.main(["-p", "Hi", "--model", str(folder), "--temp", "0", "--max-tokens", "3", "--no-save", *flags])


def test_each_of_24_flipped_bits_is_named(folder: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(14)
    for number in range(24):
        name = flip(folder, (number + draw.random()) / 24, draw.randrange(8))
        assert ask(folder) == 1
        message = capfd.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ") and f"{name} " in message.replace(f"{name}:", f"{name} "), message
        if "expected a finite number" not in message:  # an exponent is seen at load, before any digest
            assert re.search(r"\(sha256 [0-9a-f]{12}…, expected [0-9a-f]{12}…\)\. Do not use what this run", message)
        shutil.copytree(whole, folder, dirs_exist_ok=True)
    assert ask(folder) == 0
    assert "digests" not in capfd.readouterr().err


def test_no_verify_runs_what_is_there(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip(folder, 0.5, 0)
    assert ask(folder, "--no-verify") == 0


def test_a_run_and_a_chat_end_as_soon_as_it_is_known(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = flip(folder, 0.5, 0)
    reasoner = qwq_mlx.load(folder)
    with pytest.raises(DamagedModelError, match=re.escape(name)):
        reasoner.wait_for_verification()
    with pytest.raises(DamagedModelError) as error:
        reasoner.generate("Hi", sampling=GREEDY, limits=Limits(max_tokens=3))
    assert isinstance(error.value.trace, qwq_mlx.Trace) and error.value.trace.ids == ()
    questions, answers = folder.parent / "q.jsonl", folder.parent / "a.jsonl"
    questions.write_text('{"question": "Hi"}\n')
    limits = ["--max-tokens", "3", "--temp", "0"]
    assert generate.main(["--model", str(folder), "--input", str(questions), "--output", str(answers), *limits]) == 1
    with questions.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert chat.main(["--model", str(folder), *limits]) == 1
    assert capfd.readouterr().err.count(name) >= 2


def _vanish(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


def _replace(folder: Path, other: Path) -> None:
    shutil.copy(other / "config.json", folder / "manifest.json")


@pytest.mark.parametrize("change", [_vanish, _replace])
def test_a_folder_that_went_away_says_nothing_against_the_model(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Path], None]
) -> None:
    flip(folder, 0.5, 0)
    held, goes_on = threading.Event(), threading.Event()
    read = BackgroundVerification._advance

    def hold(self: BackgroundVerification, n_bytes: int) -> None:
        held.set()
        assert goes_on.wait(60)
        read(self, n_bytes)

    monkeypatch.setattr(BackgroundVerification, "_advance", hold)
    reasoner = qwq_mlx.load(folder)
    assert held.wait(60)
    change(folder, whole)
    assert "GB of the weights were compared" in reasoner.wait_for_verification(timeout_s=0)
    goes_on.set()
    assert "was changed or removed while its model was used" in reasoner.wait_for_verification(timeout_s=60)


def test_closing_and_forgetting_a_model_end_its_thread(folder: Path) -> None:
    def threads() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name == "qwq-mlx-verify"]

    reasoner = qwq_mlx.load(folder)
    reasoner.close()
    assert not threads()
    reasoner = qwq_mlx.load(folder)
    del reasoner
    assert not threads()
    assert qwq_mlx.load(folder, verify=False).wait_for_verification() == ""
