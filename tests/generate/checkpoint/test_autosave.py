"""A run kept on disk: checkpoints while it goes on, a full disk, a second keeper, and a failure at every allocation."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint
from commands import ENVIRONMENT

from qwq_mlx.errors import ConversionError, GenerationError, OptionError, OutOfMemoryError
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.checkpoint import file as checkpoint
from qwq_mlx.generate.checkpoint.autosave import Autosave
from qwq_mlx.generate.checkpoint.file import read_checkpoint
from qwq_mlx.generate.finish import failure_of
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.stream import Stream
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Step, Trace

pytestmark = pytest.mark.tiny
SAMPLED = Sampling(temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def reasoner(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return load(
        write_tiny_checkpoint(tmp_path_factory.mktemp("wide"), n_heads=2, n_kv_heads=1, max_position_embeddings=1024)
    )


def started(reasoner: Reasoner, n: int = 30, **limits: Any) -> Stream:
    return reasoner.stream(
        "x 数", sampling=SAMPLED, limits=Limits(max_tokens=n, **limits), thinking=Thinking(on_loop="off")
    )


def ids(run: Stream) -> list[int]:
    return [step.id for step in run]


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_run_with_a_quantized_cache_resumes_forks_and_goes_back_bit_for_bit(
    kv_bits: int, wide: Reasoner, tmp_path: Path
) -> None:
    whole = list(started(wide, kv_bits=kv_bits))
    run, first = started(wide, kv_bits=kv_bits), list[Step]()
    for cut in (1, 13, min(29, len(whole) - 1)):
        first += [next(run) for _ in range(cut - len(first))]
        run.save(tmp_path / "run")
        resumed = wide.resume(tmp_path / "run")
        rest = list(resumed)
        assert [(s.id, s.logprob, s.entropy) for s in first + rest] == [(s.id, s.logprob, s.entropy) for s in whole]
        forked = resumed.fork(at=cut, seed=SAMPLED.seed or 0)
        assert [step.id for step in forked] == [step.id for step in whole[cut:]]


@pytest.mark.parametrize(
    ("temperature", "kv_bits", "boundary"), [(1.0, None, 256), (0.0, 8, 256), (0.0, None, 512), (1.0, 8, 512)]
)
def test_a_run_resumes_and_forks_bit_for_bit_where_its_cache_grows(
    temperature: float, kv_bits: int | None, boundary: int, wide: Reasoner, tmp_path: Path
) -> None:
    """A cache of 256 positions is full, or has just grown, when the run is saved; the last cuts lie a step behind."""
    n_around = len(wide.stream("7").trace().prompt_ids) - 1
    n_prompt = boundary - 4

    def start() -> Stream:
        return wide.stream(
            "7" * (n_prompt - n_around),
            sampling=Sampling(temperature=temperature, seed=4),
            limits=Limits(max_tokens=12, kv_bits=kv_bits),
            thinking=Thinking(on_loop="off"),
        )

    whole = [(step.id, step.logprob, step.entropy) for step in start()]
    run = start()
    assert len(run.request.prompt_ids) == n_prompt
    assert len(whole) == 12
    capacities = []
    for number, step in enumerate(run, start=1):
        assert (step.id, step.logprob, step.entropy) == whole[number - 1]
        if not -1 <= n_prompt + number - boundary <= 3:
            continue
        run.save(tmp_path / "run")
        capacities += read_checkpoint(tmp_path / "run")[0]["capacities"]
        for other in (wide.resume(tmp_path / "run"), run.fork(at=number, seed=4)):
            assert [(step.id, step.logprob, step.entropy) for step in other] == whole[number:], number
    assert set(capacities) == {boundary, boundary + 256}, "saved before and after the growth"


def test_a_quantized_cache_is_another_computation_than_a_plain_one(wide: Reasoner) -> None:
    plain, quantized = (list(started(wide, kv_bits=bits)) for bits in (None, 4))
    assert plain[0].logprob != quantized[0].logprob


def test_going_back_over_a_banned_text_works_with_a_quantized_cache(wide: Reasoner) -> None:
    text = started(wide, kv_bits=8, banned=("e",))
    assert "e" not in "".join(step.text for step in text)


def test_a_checkpoint_is_written_every_n_tokens_and_is_whole(reasoner: Reasoner, tmp_path: Path) -> None:
    path = tmp_path / "run"
    whole = ids(started(reasoner))
    notes: list[str] = []
    with Autosave(path, every=10, warn=notes.append) as autosave:
        for step in autosave.steps(started(reasoner)):
            if step.index == 25:
                break
        assert [entry[0] for entry in read_checkpoint(path)[0]["steps"]] == whole[:20]
    assert whole[:20] + ids(reasoner.resume(path)) == whole
    assert notes == [] and [each.name for each in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_costs_a_warning_and_leaves_the_checkpoint_before(
    reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = tmp_path / "run", []
    real, n_calls = checkpoint.fsync_file, [0]

    def full(fd: int) -> None:
        n_calls[0] += 1
        if n_calls[0] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(checkpoint, "fsync_file", full)
    run = started(reasoner)
    with Autosave(path, every=10, warn=notes.append) as autosave:
        produced = [step.id for step in autosave.steps(run)]
    assert len(produced) == 30 and run.trace().finish_reason == "length"
    assert [note.split(": ")[0] for note in notes] == ["warning"], "tokens 20; the last one belongs to the end"
    assert "No space left on device" in notes[0] and "the run goes on" in notes[0]
    assert len(read_checkpoint(path)[0]["steps"]) == 10
    assert [each.name for each in tmp_path.iterdir()] == ["run"], "no half file"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.EACCES, 1)])
def test_the_exit_code_tells_a_full_disk_from_another_fault(
    number: int,
    code: int,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "fsync_file", fails)
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--max-tokens", "4", "--temp", "0"]
    assert command.main([*given, "--save", str(tmp_path / "run")]) == code
    out, err = capsys.readouterr()
    assert f"error: {tmp_path / 'run'}: the run cannot be saved ({os.strerror(number)})" in err
    assert out, "the text was shown before"


def test_a_second_keeper_of_one_file_is_refused(tmp_path: Path) -> None:
    with Autosave(tmp_path / "run", every=None, warn=print):
        script = (
            "import sys; from pathlib import Path; from qwq_mlx.generate.checkpoint.autosave import Autosave\n"
            "with Autosave(Path(sys.argv[1]), every=None, warn=print): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
        assert "ConversionError" in done.stderr and f"process {os.getpid()}" in done.stderr
        with pytest.raises(ConversionError, match="is writing it"), Autosave(tmp_path / "run", every=None, warn=print):
            pass


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".run.123.tmp", ".other.123.tmp", "run"):
        (tmp_path / name).write_text("x")
    with Autosave(tmp_path / "run", every=None, warn=print):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == [".other.123.tmp", "run"]


def test_saving_never_and_nowhere_are_refused(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match="save_every is 0, expected a number of tokens of at least 1"):
        Autosave(tmp_path / "run", every=0, warn=print)
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--save-every", "5"]
    assert command.main(given) == 2
    assert "--save-every needs --save FILE." in capsys.readouterr().err


def test_the_flags_reach_the_keeper_and_a_full_context_is_saved_and_gone_on_with(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[int] = []
    real = Autosave.save
    monkeypatch.setattr(Autosave, "save", lambda self, run: saved.append(len(run.trace().ids)) or real(self, run))
    model = ["--model", str(tiny_checkpoint)]
    path = tmp_path / "run"
    reasoner = load(tiny_checkpoint)
    n_prompt = len(reasoner.stream("x").trace().prompt_ids)
    never_ends = [f"--logit-bias={token_id}=-inf" for token_id in reasoner.model.stop_ids]
    options = ["--temp", "1", "--seed", "4", "--on-loop", "off", *never_ends]
    context = ["--context", str(n_prompt + 20)]
    assert command.main(["-p", "x", *model, *options, *context, "--save", str(path), "--save-every", "6"]) == 0
    out, err = capsys.readouterr()
    assert saved == [6, 12, 18]
    assert "context_full: the context is full" in err and f"go on with --resume {path}" in err
    assert command.main(["--resume", str(path), *model]) == 2
    assert f"--context is {n_prompt + 20}, but the run has {n_prompt + 20} positions" in capsys.readouterr().err
    more = ["--context", str(n_prompt + 40), "--json", "--no-save"]
    assert command.main(["--resume", str(path), *model, *more]) == 0
    trace = json.loads(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    assert command.main(["-p", "x", *model, *options, "--context", str(n_prompt + 40)]) == 0
    whole, err = capsys.readouterr()
    (unasked,) = tmp_path.glob("qwq-run-*")
    assert f"saved: go on with --resume {unasked.name}\n" in err
    assert len(ids(reasoner.resume(unasked, context=n_prompt + 45))) == 5
    assert trace["finish_reason"] == "context_full" and len(trace["ids"]) == 40
    assert trace["text"] == whole and whole.startswith(out)


class _Failing:
    """Counts the calls of MLX that allocate, and fails at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.n_calls, self.fails_at, self.error = 0, 0, RuntimeError
        self.text = "[malloc] Unable to allocate 1048576 bytes."
        for owner, name in ((mx, "eval"), (mx, "async_eval"), (type(module), "__call__")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.n_calls += 1
            if self.n_calls == self.fails_at:
                raise self.error(self.text)
            return real(*arguments, **named)

        return call


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, reasoner: Reasoner) -> Iterator[_Failing]:
    yield _Failing(monkeypatch, reasoner.model.module)


def test_a_failure_at_any_allocation_keeps_the_trace_and_can_be_resumed(
    reasoner: Reasoner, failing: _Failing, tmp_path: Path
) -> None:
    whole = ids(started(reasoner, 6, prefill_step=32))
    n_calls, failing.n_calls = failing.n_calls, 0
    assert n_calls > 15
    for number in range(1, n_calls + 1):
        failing.n_calls, failing.fails_at = 0, number
        failing.error = MemoryError if number % 2 else RuntimeError
        run = started(reasoner, 6, prefill_step=32)
        with pytest.raises(
            OutOfMemoryError, match=r"memory ran out \(.*Unable to allocate 1048576 bytes.*GB were planned"
        ) as caught:
            ids(run)
        trace = caught.value.trace
        assert isinstance(trace, Trace) and list(trace.ids) == whole[: len(trace.ids)]
        assert trace.finish_reason == "interrupted" and "MLX failed" in trace.detail
        run.save(tmp_path / "run")
        assert [*trace.ids, *ids(reasoner.resume(tmp_path / "run"))] == whole, number
    failing.fails_at = 0
    assert ids(started(reasoner, 6, prefill_step=32)) == whole, "the model is as good as before"


@pytest.mark.parametrize(
    ("name", "limits", "advice"),
    [
        ("reasoner", {}, "a smaller `context` or `prefill_step` 256"),  # its heads are too narrow for kv_bits
        ("reasoner", {"prefill_step": 256}, "a smaller `context`"),
        ("wide", {}, "a smaller `context` or `prefill_step` 256 or `kv_bits` 8"),
        ("wide", {"prefill_step": 64, "kv_bits": 8}, "a smaller `context` or `kv_bits` 4"),
        ("wide", {"prefill_step": 64, "kv_bits": 4}, "a smaller `context`"),
    ],
)
def test_only_what_would_be_taken_is_advised(
    name: str, limits: dict[str, Any], advice: str, request: pytest.FixtureRequest
) -> None:
    """--kv-bits 8 was advised where it is refused, and where it is given already."""
    run = started(request.getfixturevalue(name), 6, **limits)
    error = failure_of(RuntimeError("[malloc] Unable to allocate 8 bytes."), run.trace(), run.request)
    assert f"End what else takes memory, or start with {advice}. What was written" in str(error)


def test_a_refilled_run_with_banned_texts_goes_on_without_them(
    reasoner: Reasoner, failing: _Failing, tmp_path: Path
) -> None:
    failing.fails_at = 30
    run = started(reasoner, 40, banned=("e", "99"))
    with pytest.raises(GenerationError):
        ids(run)
    run.save(tmp_path / "run")
    resumed = reasoner.resume(tmp_path / "run")
    assert len(ids(resumed)) > 0
    assert "e" not in resumed.trace().text and "99" not in resumed.trace().text


NO_MEMORY = "memory ran out ({}: {}), though 0.0"


@pytest.mark.parametrize(
    ("kind", "text", "code", "told"),
    [
        (RuntimeError, "[malloc] Unable to allocate 1048576 bytes.", 5, NO_MEMORY),
        (RuntimeError, "[METAL] Command buffer execution failed: Insufficient Memory (00000008)", 5, NO_MEMORY),
        (RuntimeError, "cudaMallocAsync(&data, size, stream) failed: out of memory", 5, NO_MEMORY),
        (MemoryError, "", 5, NO_MEMORY),
        (RuntimeError, "Failed to compile kernel", 1, "MLX could not go on ({}: {})."),
    ],
)
def test_the_command_saves_what_a_failure_left_and_exits_with_5_where_memory_ran_out(
    kind: type[Exception],
    text: str,
    code: int,
    told: str,
    failing: _Failing,
    tmp_path: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing.fails_at, failing.error, failing.text = 30, kind, text
    path = tmp_path / "run"
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--max-tokens", "60", "--save", str(path), "--json"]
    assert command.main([*given, "--seed", "4"]) == code
    out, err = capsys.readouterr()
    trace = Trace.from_json(json.loads(out), where="stdout")
    assert trace.finish_reason == "interrupted"
    assert (
        "error: Step" in err and told.format(kind.__name__, text) in err and f"saved: go on with --resume {path}" in err
    )
    assert [entry[0] for entry in read_checkpoint(path)[0]["steps"]] == list(trace.ids)


def test_what_memory_ran_out_in_is_kept_unasked_where_the_disk_takes_it(
    failing: _Failing,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--max-tokens", "60", "--seed", "4"]
    for flags, n_kept in ((["--no-save"], 0), ([], 1)):
        failing.n_calls, failing.fails_at = 0, 30
        assert command.main([*given, *flags]) == 5
        assert len(list(tmp_path.iterdir())) == n_kept
    (kept,) = tmp_path.iterdir()
    assert f"saved: go on with --resume {kept.name}\n" in capsys.readouterr().err
    assert read_checkpoint(kept)[1] == {}, "no cache, so it is small"
    failing.n_calls, failing.fails_at = 0, 30
    monkeypatch.setattr(Stream, "save", lambda *_: (_ for _ in ()).throw(GenerationError("the disk is full")))
    assert command.main(given) == 5
    assert "warning: not saved: the disk is full\n" in capsys.readouterr().err


def test_killed_at_any_moment_the_file_is_whole_and_goes_on_to_the_same_ids(
    reasoner: Reasoner, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Once here; scripts/kill_runs.py does it 100 times."""
    path = tmp_path / "run"
    whole = ids(started(reasoner, 200))
    script = (
        "import sys; from pathlib import Path; from qwq_mlx.generate.checkpoint.autosave import Autosave\n"
        "from qwq_mlx.options import Limits, Sampling, Thinking\n"
        "from qwq_mlx.generate.reasoner import load\n"
        "run = load(sys.argv[1]).stream('x 数', sampling=Sampling(temperature=1.0, seed=4),\n"
        "    limits=Limits(max_tokens=200), thinking=Thinking(on_loop='off'))\n"
        "with Autosave(Path(sys.argv[2]), every=3, warn=print) as autosave:\n"
        "    for step in autosave.steps(run): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tiny_checkpoint), str(path)], env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_saved = len(read_checkpoint(path)[0]["steps"])
    assert whole[:n_saved] + ids(reasoner.resume(path)) == whole
