"""A receipt is repeated to the last id, and whatever differs is named at its first token."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint
from commands import run

from qwq_mlx.errors import OptionError, SavingError, SourceError
from qwq_mlx.generate import __main__ as generate
from qwq_mlx.generate import receipt as receipt_module
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.receipt import Receipt, read_receipt
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.replay import __main__ as command
from qwq_mlx.replay.compare import Difference, replay
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def reasoner(known_checkpoint: Path) -> Reasoner:
    return load(known_checkpoint)


@pytest.fixture(scope="module")
def receipt(reasoner: Reasoner) -> Receipt:
    return reasoner.receipt(written(reasoner, limits=Limits(max_tokens=2)))


def written(reasoner: Reasoner, **options: Any) -> Trace:
    settings: dict[str, Any] = {"sampling": Sampling(temperature=1.0, seed=4), "limits": Limits(max_tokens=40)}
    return reasoner.generate("x 数", **(settings | options))


CASES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "greedy": {"sampling": Sampling(temperature=0.0, repetition_penalty=1.2, logit_bias={40: -2.5, 41: float("-inf")})},
    "budget": {"thinking": Thinking(think_tokens=0, answer_tokens=20), "limits": Limits(max_tokens=90)},
    "guarded": {"limits": Limits(max_tokens=40, banned=("e",), language_guard=True, stop=("qq",))},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_repeated_from_its_receipt(case: str, reasoner: Reasoner, tmp_path: Path) -> None:
    trace = written(reasoner, **CASES[case])
    reasoner.receipt(trace).save(tmp_path / "receipt.json")
    receipt = read_receipt(tmp_path / "receipt.json")
    assert receipt == reasoner.receipt(trace)
    found = replay(reasoner, receipt)
    assert found.difference is None and found.changed == ()
    assert found.n_compared == found.n_expected == found.n_ids == len(trace.ids)


def test_the_question_is_told_apart_from_the_system_prompt(reasoner: Reasoner, tmp_path: Path) -> None:
    trace = written(reasoner, system_prompt="请用中文。", limits=Limits(max_tokens=40, language_guard=True))
    receipt = reasoner.receipt(trace)
    assert (receipt.question, receipt.settings["system_prompt"]) == ("x 数", "请用中文。")
    assert reasoner.rerun(receipt).request.written == "请用中文。 x 数", "its scripts are at home too"
    assert replay(reasoner, receipt).difference is None
    run = reasoner.stream("x", system_prompt="Be brief.", sampling=Sampling(seed=1), limits=Limits(max_tokens=3))
    next(run)
    run.save(tmp_path / "run")
    assert reasoner.resume(tmp_path / "run").request.written == "Be brief. x"
    assert "system_prompt" not in written(reasoner, limits=Limits(max_tokens=2)).settings


def test_the_receipt_holds_digests_that_anybody_can_make(reasoner: Reasoner, tmp_path: Path) -> None:
    trace = written(reasoner)
    reasoner.receipt(trace).save(tmp_path / "receipt.json")
    values = json.loads((tmp_path / "receipt.json").read_text())
    text = hashlib.sha256(trace.text.encode()).hexdigest()
    tokenizer = hashlib.sha256((reasoner.model.folder / "tokenizer.json").read_bytes()).hexdigest()
    template = json.loads((reasoner.model.folder / "tokenizer_config.json").read_text())["chat_template"]
    assert values["text_sha256"] == text and values["tokenizer_sha256"] == tokenizer
    assert values["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert values["ids_sha256"] == hashlib.sha256(" ".join(map(str, trace.ids)).encode()).hexdigest()
    assert values["versions"]["mlx"] == version("mlx") and values["versions"]["qwq-mlx"]
    assert values["settings"]["sampling"]["seed"] == 4 and values["backend"] in ("cpu", "metal", "cuda")
    assert list(values)[-1] == "sha256" and "text" not in values


@pytest.mark.parametrize("place", [0, 7, 39])
def test_the_first_difference_is_named(place: int, reasoner: Reasoner) -> None:
    receipt = reasoner.receipt(written(reasoner))
    ids = list(receipt.ids)
    there, ids[place] = ids[place], 40
    found = replay(reasoner, dataclasses.replace(receipt, ids=tuple(ids)))
    assert found.n_compared == place and found.difference is not None
    letters = [reasoner.pieces[each].decode("utf-8", "replace") for each in (40, there)]
    assert str(found.difference) == f"token {place}: expected id 40 {letters[0]!r}, found id {there} {letters[1]!r}"


def test_an_output_that_ends_elsewhere_is_another(reasoner: Reasoner) -> None:
    receipt = reasoner.receipt(written(reasoner))
    shorter = replay(reasoner, dataclasses.replace(receipt, ids=receipt.ids[:-1]))
    assert str(shorter.difference).startswith("token 39: expected the end, found id")
    longer = replay(reasoner, dataclasses.replace(receipt, ids=(*receipt.ids, 40)))
    assert str(longer.difference).startswith("token 40: expected id 40") and "found the end" in str(longer.difference)
    text = replay(reasoner, dataclasses.replace(receipt, text_sha256="0"))
    assert str(text.difference) == "all ids are the same, their text is not: the tokenizer is another"
    assert isinstance(text.difference, Difference) and text.n_compared == 40


def test_what_a_person_did_is_compared_as_far_as_it_can_be(reasoner: Reasoner) -> None:
    run = reasoner.stream("x 数", sampling=Sampling(temperature=1.0, seed=4), limits=Limits(max_tokens=40))
    for _ in range(5):
        next(run)
    run.stop()
    list(run)
    stopped = run.trace()
    assert stopped.finish_reason == "interrupted" and len(stopped.ids) == 6
    found = replay(reasoner, reasoner.receipt(stopped))
    assert found.difference is None and found.n_compared == 6
    run = reasoner.stream("x 数", sampling=Sampling(temperature=1.0, seed=4), limits=Limits(max_tokens=200))
    next(run)
    run.answer_now()
    list(run)
    asked = run.trace()
    start = asked.injections[0].start
    found = replay(reasoner, reasoner.receipt(asked))
    assert found.difference is None and (found.n_compared, found.n_ids) == (start, len(asked.ids))
    assert "cannot be" in command._text(found)


def test_tokens_that_were_taken_back_are_no_difference(reasoner: Reasoner) -> None:
    letter = next(i for i in range(reasoner.pieces.n_ids) if reasoner.pieces[i] == b"a")
    bias = dict.fromkeys(reasoner.model.stop_ids, float("-inf")) | {letter: 12.0}
    trace = written(
        reasoner,
        sampling=Sampling(temperature=0.0, seed=1, logit_bias=bias),
        limits=Limits(max_tokens=200),
        thinking=Thinking(on_loop="nudge"),
    )
    assert any(each["event"] == "loop" for each in trace.events)
    found = replay(reasoner, reasoner.receipt(trace))
    assert found.difference is None and found.n_compared == len(trace.ids)


def test_what_a_receipt_cannot_hold_is_refused(reasoner: Reasoner, tmp_path: Path) -> None:
    hooked = written(reasoner, logits_processors=[lambda tokens, logits: mx.negative(logits)])
    with pytest.raises(OptionError, match="The run had logits processors of its caller, which its receipt"):
        replay(reasoner, reasoner.receipt(hooked))
    run = reasoner.stream("x", sampling=Sampling(seed=1), limits=Limits(max_tokens=8))
    list(run)
    fork = run.fork(at=4, seed=2)
    next(fork)
    fork.save(tmp_path / "fork")
    for each in (fork, reasoner.resume(tmp_path / "fork")):
        list(each)
        with pytest.raises(OptionError, match="The run had a beginning drawn with another seed"):
            replay(reasoner, reasoner.receipt(each.trace()))


def test_a_flipped_byte_of_a_receipt_is_refused(reasoner: Reasoner, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    reasoner.receipt(written(reasoner, limits=Limits(max_tokens=2))).save(path)
    good = path.read_bytes()
    for place in range(0, len(good) - 1, 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(SourceError, match=str(path)):
            read_receipt(path)
    path.write_text("{}")
    with pytest.raises(SourceError, match=r"is None of schema None, expected 'qwq_mlx receipt' of schema 2\. Give"):
        read_receipt(path)


FORGED: dict[str, Any] = {
    "ids is missing, expected a value": lambda values: values.pop("ids"),
    "model.compute_type is None, expected a text": lambda values: values["model"].pop("compute_type"),
    "model is 3, expected an object": lambda values: values.update(model=3),
    "injections[0] is 'x', expected an object": lambda values: values.update(injections=["x"]),
    "injections[0].start is missing": lambda values: values.update(injections=[{}]),
    "ids is with the id -1, expected ids of a vocabulary": lambda values: values.update(ids=[-1]),
    "prompt_ids is with the id 1000": lambda values: values.update(prompt_ids=[10**30]),
    "the settings cannot be read": lambda values: values["settings"].pop("thinking"),
    "settings is [], expected an object": lambda values: values.update(settings=[]),
}


@pytest.mark.parametrize("expected", FORGED)
def test_a_sealed_receipt_with_other_fields_is_refused(
    expected: str, reasoner: Reasoner, receipt: Receipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(receipt)))
    FORGED[expected](values)
    monkeypatch.setattr(receipt_module, "asdict", lambda _: values)
    receipt.save(tmp_path / "receipt.json")
    with pytest.raises(SourceError) as caught:
        read_receipt(tmp_path / "receipt.json")
    assert expected.removesuffix(", expected an object") in str(caught.value)


def test_a_full_disk_is_told_with_the_path(reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(receipt_module, "write_file", full)
    with pytest.raises(SavingError, match=r"r\.json: the receipt cannot be saved \(No space left on device\)"):
        reasoner.receipt(written(reasoner)).save(tmp_path / "r.json")


def given(model: Path, receipt: Path, *more: str) -> list[str]:
    return [str(receipt), "--model", str(model), *more]


def test_the_commands_write_a_receipt_and_repeat_it(
    known_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["-p", "x", "--receipt", str(tmp_path / "none" / "r")]) == 2
    assert "error: --receipt is '" in capfd.readouterr().err
    path = tmp_path / "receipt.json"
    asked = ["-p", "Hé", "--model", str(known_checkpoint), "--seed", "3", "--max-tokens", "9", "--receipt", str(path)]
    assert generate.main(asked) == 0
    text = capfd.readouterr().out
    assert read_receipt(path).text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    done = run("qwq_mlx.replay", *given(known_checkpoint, path))
    assert (done.returncode, done.stdout) == (0, b"the same: 9 of 9 tokens were compared\n")
    assert done.stderr == b""

    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    assert command.main(given(other, path)) == 2
    message = "is another model than 'checkpoint' (bfloat16) of the receipt; their digests differ"
    found = capfd.readouterr().err
    assert str(other) in found and message.split(" (")[0] in found and "--other-weights" in found
    assert command.main(given(other, path, "--other-weights", "--json")) == 1
    assert json.loads(capfd.readouterr().out)["difference"]["index"] == 0
    assert command.main(given(other, path, "--other-weights", "--quiet")) == 1
    out, err = capfd.readouterr()
    assert "different: 0 tokens are the same, then token 0: expected id" in out and err == ""
    assert command.main([str(tmp_path / "none")]) == 2
    assert "there is no such file. Give a receipt of a run." in capfd.readouterr().err


def test_other_versions_are_told(reasoner: Reasoner) -> None:
    receipt = reasoner.receipt(written(reasoner))
    old = dataclasses.replace(receipt, versions={**receipt.versions, "mlx": "0.1"}, backend="metal")
    found = replay(reasoner, old)
    assert found.changed == (
        f"mlx {version('mlx')}, the receipt's is 0.1",
        f"backend {receipt.backend}, the receipt's is metal",
    )
    assert command._text(found).startswith("mlx ")


def test_a_receipt_of_a_run_with_a_hook_under_its_old_name_is_refused_too(reasoner: Reasoner) -> None:
    receipt = reasoner.receipt(written(reasoner))
    old = dataclasses.replace(receipt, settings={**receipt.settings, "logits_hook": True})
    with pytest.raises(OptionError, match="The run had logits processors of its caller"):
        reasoner.rerun(old)
