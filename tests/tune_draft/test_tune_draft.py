"""`tune_draft`: a drafter learns from traces, goes on after kills, and is not kept where it got no better."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from mlx.utils import tree_flatten

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import (
    ConversionError,
    DiskFullError,
    FitError,
    LoadError,
    NotFiniteError,
    OptionError,
    QwqError,
    SourceError,
)
from qwq_mlx.generate.drafting import choose_draft
from qwq_mlx.generate.question_file.results import result_line
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.serve.history import History, KeptRun
from qwq_mlx.trace.trace import Trace
from qwq_mlx.tune_draft import job
from qwq_mlx.tune_draft.__main__ import main
from qwq_mlx.tune_draft.examples import Example, read_examples, split_by_problem
from qwq_mlx.tune_draft.job import Progress, Stopped, Tuning, tune_draft
from qwq_mlx.tune_draft.memory import check_fits
from qwq_mlx.tune_draft.settings import TuneSettings
from qwq_mlx.tune_draft.staging import Staging
from qwq_mlx.tune_draft.tokens_a_pass import n_passes, tokens_a_pass
from qwq_mlx.tune_draft.training import Trainer
from qwq_mlx.tune_draft.windows import batches, cut

pytestmark = pytest.mark.tiny

FAST = TuneSettings(all_weights=True, learning_rate=0.01, epochs=2, batch_tokens=256, max_length=128)
TEXTS = ("the answer is so", "wait and so the answer")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("draft") / "draft", n_layers=1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that are easy to learn: each says one of two sentences again and again."""
    path = tmp_path_factory.mktemp("recorded") / "recorded.jsonl"
    rows = [{"prompt": f"Question {n}", "response": f" {TEXTS[n % 2]}" * 5, "id": n} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trace(draft: Path) -> Trace:
    reasoner = load(draft)
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))
    sampling = Sampling(temperature=0.7, seed=1, logit_bias=never_stop)
    return reasoner.generate("Question", sampling=sampling, limits=Limits(max_tokens=60))


def tuned(draft: Path, recorded: Path, output: Path, settings: TuneSettings = FAST, **more: Any) -> dict[str, Any]:
    return tune_draft(Tuning(draft=draft, traces=[recorded], output=output, **more), settings)


def test_a_drafter_learns_the_traces_and_can_draft_afterwards(draft: Path, recorded: Path, tmp_path: Path) -> None:
    result = tuned(draft, recorded, tmp_path / "tuned")
    before, after = result["before"], result["after"]
    assert before["tokens"] == after["tokens"] > 20
    assert after["by_length"]["8"] > 2 > 1.1 > before["by_length"]["8"]
    assert list(after["by_length"].values()) == sorted(after["by_length"].values())
    files = open_model_folder(tmp_path / "tuned")
    assert choose_draft(tmp_path / "tuned", None, open_model_folder(draft)).files is not None
    assert {entry.dtype for _, entry in files.checkpoint.tensors.values()} == {"BF16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (files.path / name).read_bytes() == (draft / name).read_bytes()
    assert not (tmp_path / "tuned.partial").exists()


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def test_a_tuning_that_is_cut_anywhere_goes_on_to_the_same_bytes(
    draft: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(draft, recorded, tmp_path / "whole")
    monkeypatch.setattr(job, "_SAVE_EVERY_S", -1.0)  # behind every step
    places = [(Trainer, "step", 3), (Staging, "save_step", 2), (Staging, "write_model", 1), (Staging, "discard", 1)]
    for owner, name, after in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, cut_after(getattr(owner, name), after))
            with pytest.raises(Killed):
                tuned(draft, recorded, tmp_path / "cut")
        assert (tmp_path / "cut").exists() is (name == "discard")
    steps: list[Progress] = []
    tuning = Tuning(draft=draft, traces=[recorded], output=tmp_path / "cut")
    result = tune_draft(tuning, FAST, progress=steps.append)
    assert not steps, "it was published, only the folder beside it was left"
    assert result["after"]["named"] > result["before"]["named"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut"}


def cut_after(method: Callable[..., Any], n_calls: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    def cut(*arguments: Any) -> Any:
        if next(calls) > n_calls - 1:
            raise Killed
        return method(*arguments)

    return cut


def test_what_is_stopped_is_kept_and_another_tuning_does_not_go_on_with_it(
    draft: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = Tuning(draft=draft, traces=[recorded], output=tmp_path / "tuned")
    limit_before = mx.set_cache_limit(5 << 30)
    memory_before = mx.set_memory_limit(6 << 30)
    limits: list[int] = []
    steps: list[Progress] = []

    def is_stopped() -> bool:
        limits.extend((mx.set_cache_limit(1 << 30), mx.set_memory_limit(7 << 30)))
        return bool(steps)

    def show(progress: Progress) -> None:
        if progress.what == "training" and progress.n_done:
            steps.append(progress)

    with pytest.raises(Stopped):
        tune_draft(tuning, FAST, is_stopped=lambda: True)
    assert [path.name for path in (tmp_path / "tuned.partial").iterdir()] == ["tuning.json"]  # not yet measured
    with pytest.raises(Stopped):
        tune_draft(tuning, FAST, progress=show, is_stopped=is_stopped)
    planned = check_fits(open_model_folder(draft).config, FAST, limit_bytes=1 << 40, backend="cpu")
    assert len(steps) == 1 and limits[:2] == [1 << 30, planned], "of freed memory, and of all that MLX holds"
    assert (mx.set_cache_limit(limit_before), mx.set_memory_limit(memory_before)) == (5 << 30, 6 << 30)
    assert [path.name for path in (tmp_path / "tuned.partial").glob("step-*")] == ["step-1.safetensors"]
    other = TuneSettings(**{**{name: getattr(FAST, name) for name in FAST.__slots__}, "seed": 5})
    with pytest.raises(ConversionError, match="other `held_out`, `seed`, `traces`"):
        tune_draft(tuning, other)
    step = tmp_path / "tuned.partial" / "step-1.safetensors"
    staging = Staging(tmp_path / "tuned", {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    n_held = step.stat().st_size  # of what is needed
    staging.check_disk(n_held + 900_000)
    with pytest.raises(DiskFullError, match="Make room"):
        staging.check_disk(n_held + 1_000_000)
    monkeypatch.undo()
    step.write_bytes(step.read_bytes()[:100])
    with pytest.raises(SourceError, match=r"step-1\.safetensors: cannot be read .* Pass `restart=True` to begin anew"):
        tune_draft(tuning, FAST)


def test_a_disk_that_takes_no_more_is_named_and_keeps_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(tmp_path / "tuned", {})
    staging.open(restart=False)

    def refuse(path: str, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write")

    monkeypatch.setattr(mx, "save_safetensors", refuse)
    for free, kind in ((0, DiskFullError), (1 << 30, ConversionError)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(kind, match=r"step-1\.safetensors: cannot be written .* Make room"):
            staging.save_step(1, {"a": mx.zeros(2)})
    assert [path.name for path in staging.folder.iterdir()] == ["tuning.json"]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwq_mlx.tune_draft.staging.write_file", full)
    with pytest.raises(DiskFullError, match=r"before\.json: cannot be written"):
        staging.once(dict)


def test_a_kill_while_a_tuning_is_removed_leaves_one_that_can_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(tmp_path / "tuned", {"seed": 1})
    staging.open(restart=False)
    staging.save_step(1, {"a": mx.zeros(2)})
    staging.write_model({"b": mx.zeros(2)}, {"config.json": b"{}"})
    remove = shutil.rmtree

    def killed(path: Path) -> None:
        if path == staging.folder:
            raise Killed
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        staging.discard()
    assert [path.name for path in staging.folder.iterdir()] == ["tuning.json"]
    staging.open(restart=False)
    assert staging.last_step() is None


def test_options_that_would_not_be_used_are_refused(
    draft: Path, recorded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--draft", str(draft), "--traces", str(recorded), "--output", "none"]
    assert main([*arguments, "--all-weights", "--rank", "4"]) == 2
    assert main([*arguments, "--held-out", str(recorded), "--held-out-share", "0.2"]) == 2
    shown = capfd.readouterr().err
    assert "with --all-weights there are no LoRA layers" in shown and "--held-out says what is measured on" in shown


def test_a_drafter_that_got_no_better_is_not_kept(
    draft: Path, recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--draft", str(draft), "--traces", str(recorded), "--output", str(tmp_path / "tuned"), "--epochs", "1"]
    arguments += ["--learning-rate", "1e-9", "--rank", "2", "--batch-tokens", "1024", "--max-length", "128"]
    assert main([*arguments, "--json"]) == 1
    shown = capfd.readouterr()
    result = json.loads(shown.out)
    assert result["is_kept"] is False and result["after"]["named"] == result["before"]["named"]
    assert "not kept" in shown.err and "--keep keeps it all the same" in shown.err
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--keep", "--quiet"]) == 0
    shown = capfd.readouterr()
    assert shown.err == "" and "before" in shown.out and str(tmp_path / "tuned") in shown.out
    assert open_model_folder(tmp_path / "tuned").config.num_hidden_layers == 1
    assert main([*arguments, "--keep", "--quiet"]) == 1
    assert "exists already" in capfd.readouterr().err


def test_lora_layers_add_what_they_learnt_to_the_weights(draft: Path, recorded: Path, tmp_path: Path) -> None:
    """Of a conversion, whose codes become floats: the fused tensors give the logits of the layers apart."""
    convert_checkpoint(draft, tmp_path / "packed", recipe="4bit-min-max")
    model = load_model(tmp_path / "packed")
    examples = read_examples([recorded], model.tokenizer, folder=draft)
    trainer = Trainer(model, TuneSettings(rank=2, learning_rate=0.05), n_steps=3)
    [batch] = batches(cut(examples[:3], 128), 1024)
    losses = [trainer.step(batch) for _ in range(3)]
    assert losses[2] < losses[0]
    weights = trainer.weights()
    apart = trainer._module(mx.array(batch.ids))
    fused = load_model(draft).module
    fused.load_weights([(name, array.astype(mx.float32)) for name, array in weights.items()], strict=True)
    assert {name for name, _ in tree_flatten(fused.parameters())} == set(weights)
    assert np.abs(np.array(fused(mx.array(batch.ids)) - apart)).max() < 0.05  # bfloat16 has 8 bits
    other = model.module(mx.array(batch.ids))
    assert np.abs(np.array(other - apart)).max() > 0.5


def test_the_loss_is_that_of_written_ids_behind_their_whole_text(draft: Path, recorded: Path) -> None:
    model = load_model(draft)
    [example, *_] = read_examples([recorded], model.tokenizer, folder=draft)
    [batch] = batches(cut([example], 256), 256)
    loss = Trainer(model, FAST, n_steps=1).step(batch)
    logits = np.array(model.module(mx.array([[*example.prompt_ids, *example.ids]]))[0].astype(mx.float32), np.float64)
    at = logits[len(example.prompt_ids) - 1 : -1]
    log_total = np.log(np.exp(at).sum(axis=1))
    expected = (log_total - at[np.arange(len(at)), list(example.ids)]).mean()
    assert abs(loss - expected) < 1e-4
    told = tokens_a_pass(model.module, [batch])
    assert told.named == (at.argmax(axis=1) == np.array(example.ids)).mean()


def test_a_step_that_spoils_the_weights_is_refused_at_once(draft: Path, recorded: Path) -> None:
    model = load_model(draft)
    [batch] = batches(cut(read_examples([recorded], model.tokenizer, folder=draft)[:1], 256), 256)
    trainer = Trainer(model, FAST, n_steps=1)
    trainer._loss = lambda trained, *_: mx.sqrt(0.0 * tree_flatten(trained)[0][1].sum())  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match=r"Step 1 of training: the loss is 0\.0, the gradient's norm nan"):
        trainer.step(batch)


def test_bfloat16_learns_as_float32_does(draft: Path, recorded: Path) -> None:
    """A step of 1e-4 is less than bfloat16 can add to most weights; what is trained is float32 in both."""
    losses = {}
    for compute_type in ("float32", "bfloat16"):
        model = load_model(draft, compute_type=compute_type)
        examples = read_examples([recorded], model.tokenizer, folder=draft)
        [batch] = batches(cut(examples[:2], 128), 1024)
        trainer = Trainer(model, TuneSettings(all_weights=True, learning_rate=1e-4), n_steps=5)
        losses[compute_type] = [trainer.step(batch) for _ in range(5)]
    learnt = {name: values[0] - values[-1] for name, values in losses.items()}
    assert learnt["float32"] > 0.01
    assert abs(learnt["bfloat16"] / learnt["float32"] - 1) < 0.2


def test_windows_have_each_written_id_once_behind_half_a_window(draft: Path) -> None:
    rng = np.random.default_rng(3)
    for n_prompt, n_ids in itertools.product((1, 5, 15, 16, 17, 40), (1, 2, 15, 16, 17, 33, 70)):
        ids = tuple(rng.integers(1, 99, n_prompt + n_ids).tolist())
        is_written = tuple((rng.random(n_ids) < 0.8).tolist())
        example = Example(problem="", prompt_ids=ids[:n_prompt], ids=ids[n_prompt:], is_written=is_written)
        windows = cut([example], 16)
        places = [window.start + target for window in windows for target in window.targets]
        assert places == [n_prompt + place for place, written in enumerate(is_written) if written]
        for window in windows:
            assert len(window.ids) <= 16 and window.ids == ids[window.start : window.start + len(window.ids)]
            assert window.start == 0 or window.targets[0] >= 8
        made = batches(windows, 96)
        assert sum(len(batch.targets) for batch in made) == len(places)
        for batch in made:
            assert batch.ids.size <= 96 and batch.ids.shape[1] == 32
            np.testing.assert_array_equal(batch.ids.reshape(-1)[batch.places + 1], batch.targets)


def test_passes_are_counted_as_the_target_would_make_them() -> None:
    rng = np.random.default_rng(1)
    for length in (1, 2, 3, 8):
        is_right = (rng.random(200) < 0.7).tolist()
        place = n = 0
        while place < len(is_right):
            accepted = 0
            while accepted < length and place + accepted < len(is_right) and is_right[place + accepted]:
                accepted += 1
            place, n = place + accepted + 1, n + 1
        assert n_passes(is_right, length) == n
    assert n_passes([True] * 9, 8) == 1 and n_passes([False] * 9, 8) == 9


def test_traces_of_all_kinds_are_the_same_example(draft: Path, trace: Trace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(draft, vocab_size=320)
    trace.save(tmp_path / "trace.jsonl")
    line = result_line({"index": 0, "run": {}, "id": 0}, trace)
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with contextlib.closing(History(tmp_path / "history", max_bytes=1 << 20)) as history:
        info = {"id": "run-1", "created": 0.0, "state": "stopped", "parent": None}
        request = {"question": trace.question, "prompt_ids": trace.prompt_ids}
        kept = KeptRun(info=info, model="a", request=request)
        steps = [
            json.dumps({"id": token_id, "text": text, "is_injected": False}).encode() + b"\n"
            for token_id, text in zip(trace.ids, trace.texts, strict=True)
        ]
        history.write(kept, start=0, lines=steps[:40])
        history.write(kept, start=30, lines=steps[30:])
        names = ("trace.jsonl", "results.jsonl", "history")
        [one], [other], [kept_one] = (read_examples([tmp_path / name], tokenizer, folder=draft) for name in names)
    assert one == other == kept_one
    assert (one.prompt_ids, one.ids, one.problem) == (trace.prompt_ids, trace.ids, "Question")
    row = {"prompt": "Question", "response": "the answer", "format": "chat", "index": 0, "run": 1}
    (tmp_path / "recorded.jsonl").write_text(json.dumps(row), encoding="utf-8")
    [third] = read_examples([tmp_path / "recorded.jsonl"], tokenizer, folder=draft)
    assert third.prompt_ids == trace.prompt_ids
    assert tokenizer.backend.decode(list(third.ids)) == "the answer"


def test_problems_are_held_out_whole_whatever_the_order() -> None:
    def example(number: int) -> Example:
        return Example(problem=str(number % 10), prompt_ids=(1,), ids=(number,), is_written=(True,))

    examples = [example(number) for number in range(40)]
    split = split_by_problem(examples, None, share=0.3, seed=4)
    again = split_by_problem(examples[::-1], None, share=0.3, seed=4)
    assert len(split.held_out) == 12 and sorted(each.ids for each in again.held_out) == sorted(
        each.ids for each in split.held_out
    )
    assert not {each.problem for each in split.training} & {each.problem for each in split.held_out}
    few = split_by_problem([example(1), example(2), example(12)], None, share=0.9, seed=4)
    assert len(few.training) in (1, 2) and len(few.training) + len(few.held_out) == 3
    others = split_by_problem(examples, [example(3)], share=0.3, seed=4)
    assert len(others.training) == 36 and len(others.held_out) == 1


def refusals(draft: Path, recorded: Path, trace: Trace, folder: Path) -> Iterator[tuple[dict[str, Any], type, str]]:
    one, other, empty = folder / "one.jsonl", folder / "other.jsonl", folder / "empty.jsonl"
    one.write_text(recorded.read_text(encoding="utf-8").split("\n")[0], encoding="utf-8")
    other.write_text(json.dumps({"question": "?"}), encoding="utf-8")
    empty.write_text(json.dumps({"prompt": "?", "response": ""}), encoding="utf-8")
    yield {"draft": folder / "none"}, LoadError, "no such folder"
    yield {"traces": [folder / "none"]}, SourceError, "no such file"
    yield {"traces": [other]}, SourceError, "expected prompt and response"
    yield {"traces": [empty]}, SourceError, "no output holds a token"
    damaged = folder / "damaged"
    damaged.write_bytes(b"SQLite format 3\0" + bytes(4000))
    yield {"traces": [damaged]}, SourceError, "no history of `serve`, or is damaged"
    for number, (start, token_id) in enumerate(((0, "x"), (0, -1), (3, 1))):
        edited = folder / f"edited-{number}"
        line = json.dumps({"id": token_id, "text": "a", "is_injected": False}).encode()
        with contextlib.closing(sqlite3.connect(edited)) as connection:
            connection.executescript("CREATE TABLE runs (id, created, request); PRAGMA user_version = 1")
            connection.execute("CREATE TABLE steps (run, start, lines)")
            connection.execute("INSERT INTO runs VALUES ('r', 0, '{}')")
            connection.execute("INSERT INTO steps VALUES ('r', ?, ?)", (start, zlib.compress(line)))
            connection.commit()
        yield {"traces": [edited]}, SourceError, "is damaged"
    yield {"traces": [one]}, OptionError, "1 problem, expected at least 2"
    yield {"held_out": [recorded]}, OptionError, "nothing is left to train on"
    yield {"output": folder / "no" / "folder"}, OptionError, "Make it first"
    yield {"output": draft / "tuned"}, OptionError, "lies in the drafter's folder"
    yield {"output": draft.parent}, ConversionError, "exists already"
    trace.save(folder / "trace.jsonl")
    changed = folder / "changed"
    write_tiny_checkpoint(changed, n_layers=1)
    tokenizer = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    letter = next(text for text in trace.texts if len(text) == 1 and text in vocabulary)
    vocabulary[letter], vocabulary["~"] = vocabulary["~"], vocabulary[letter]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    yield {"draft": changed, "traces": [folder / "trace.jsonl"]}, OptionError, "another than that of the traces"


def test_bad_input_is_refused_before_a_weight_is_read(
    draft: Path, recorded: Path, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_model", None)
    for changed, kind, message in refusals(draft, recorded, trace, tmp_path):
        tuning = Tuning(**{"draft": draft, "traces": [recorded], "output": tmp_path / "tuned", **changed})
        with pytest.raises(QwqError, match=message) as refused:
            tune_draft(tuning, FAST)
        assert isinstance(refused.value, kind)
    for name, value in {"rank": 0, "max_length": 17, "held_out_share": 1.0, "learning_rate": 0.0}.items():
        with pytest.raises(OptionError, match=f"^{name} is {value}, expected"):
            TuneSettings(**{name: value})
    config = open_model_folder(draft).config
    with pytest.raises(FitError, match=r"training .* GB(.|\n)*Leave out `all_weights`"):
        check_fits(config, FAST, limit_bytes=1_000_000, backend="cuda")


def test_the_planned_memory_holds_what_a_step_takes(draft: Path, recorded: Path) -> None:
    gc.collect()
    others = mx.get_active_memory()
    model = load_model(draft)
    examples = read_examples([recorded], model.tokenizer, folder=draft)
    batch = max(batches(cut(examples, 128), 256), key=lambda each: each.ids.size)
    for settings in (FAST, TuneSettings(rank=2, batch_tokens=256, max_length=128)):
        trainer = Trainer(model, settings, n_steps=2)
        mx.eval(trainer.state())
        mx.reset_peak_memory()
        trainer.step(batch)
        trainer.step(batch)
        planned = check_fits(model.config, settings, limit_bytes=1 << 40, backend="cpu")
        assert 0.3 * planned < mx.get_peak_memory() - others < planned
