"""The evaluate command: rows that go on wherever they were cut, settings held, reports that say what the rows say."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import weakref
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.evaluate import models as models_module
from qwq_mlx.evaluate import rows as rows_module
from qwq_mlx.evaluate.__main__ import main
from qwq_mlx.evaluate.folder import begin, read_evaluation, write_evaluation
from qwq_mlx.evaluate.rows import judged_rows
from qwq_mlx.evaluate.task import read_task
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.question_file.results import Results, read_traces
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.pocket import FOLDER as POCKET
from qwq_mlx.reasoning.answer import math_verify

pytestmark = pytest.mark.pocket
SUMS = [
    {"id": "a", "question": "What is 3 + 4?", "answer": "7", "level": "1", "subject": "sums"},
    {"id": "b", "question": "What is 12 + 30?", "answer": "42", "level": "1", "subject": "sums"},
    {"id": "c", "question": "What is 5 * 6?", "answer": "31", "level": "2", "subject": "<b>products</b>"},
]
ASKS = ["--instruction", "", "--max-tokens", "40", "--seed", "5", "--no-verify", "--quiet"]


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process takes over a second each time; its verdicts are tested by themselves."""
    monkeypatch.setattr(math_verify, "has_math_verify", lambda: False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sums.jsonl, and a whole evaluation of it in `whole`: the pocket model, 2 samples of 3 problems."""
    home = tmp_path_factory.mktemp("evaluate")
    (home / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SUMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_verify, "has_math_verify", lambda: False)
        assert main(command(home, "whole")) == 0
        one = table(home / "whole")
        assert main([*command(home, "whole"), "--samples", "2", "--lm-eval"]) == 0
    assert len(one) == 4 and table(home / "whole")[:4] == one, "more samples continue the folder"
    return home


def command(home: Path, output: str, *models: Path) -> list[str]:
    named = [argument for model in models or (POCKET,) for argument in ("--model", str(model))]
    return ["--task", str(home / "sums.jsonl"), "--output", str(home / output), *named, *ASKS]


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "checkpoint.rows.jsonl").read_bytes().splitlines()]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_row_says_what_it_depends_on_and_where_its_trace_is(home: Path) -> None:
    first, *rows = table(home / "whole")
    assert set(first) == {"judges"} and len(rows) == 6
    traces = [trace for _, trace in read_traces(home / "whole" / "checkpoint.traces.jsonl")]
    for place, (row, trace) in enumerate(zip(rows, traces, strict=True)):
        assert trace is not None
        assert (row["problem"], row["sample"]) == ("abc"[place % 3], place // 3)
        assert row["seed"] == question_seed(5, place) == trace.settings["sampling"]["seed"]
        assert row["trace"] == f"checkpoint.traces.jsonl:{place + 1}" and row["answer"] == trace.answer
        assert row["is_right"] is (trace.answer == SUMS[place % 3]["answer"])
        assert row["settings"] == trace.settings and row["n_tokens"] == len(trace.ids)
        assert trace.question == SUMS[place % 3]["question"], "no instruction is put behind it"
    assert {row["prompt_sha256"] for row in rows[:3]} == {row["prompt_sha256"] for row in rows[3:]}
    assert Counter(row["is_right"] for row in rows)[True] == 4, "the third problem's reference answer is wrong"


def test_samples_are_written_in_lm_evals_form(home: Path) -> None:
    lines = [json.loads(line) for line in (home / "whole" / "checkpoint.lm_eval.jsonl").read_bytes().splitlines()]
    traces = [trace for _, trace in read_traces(home / "whole" / "checkpoint.traces.jsonl")]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 0, 1, 2]
    for line, row, trace in zip(lines, table(home / "whole")[1:], traces, strict=True):
        assert trace is not None and line["resps"] == [[trace.text]]
        assert line["filtered_resps"] == [row["answer"]] and line["exact_match"] == float(row["is_right"])
        assert line["target"] == line["doc"]["answer"]
        assert line["arguments"]["gen_args_0"]["arg_0"] == line["doc"]["question"]
    fields = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics")
    assert (*fields, "doc_hash", "prompt_hash", "target_hash") == tuple(lines[0])[:11], "those of lm-eval 0.4.13"


def test_the_report_says_what_the_rows_say(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (home / "whole").iterdir()}
    code, out, err = run(capsys, "--output", str(home / "whole"), "--json")
    assert (code, err) == (0, "") and json.loads(out) == json.loads(out)
    report, [model] = json.loads(out), json.loads(out)["models"]
    assert json.loads((home / "whole" / "report.json").read_text()) == {
        **report,
        "format": "qwq_mlx evaluation report",
        "schema": 1,
    }
    assert (model["n_problems"], model["n_samples"], model["accuracy"]) == (3, 2, pytest.approx(4 / 6))
    assert model["pass_at_k"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(2 / 3)}
    assert model["endings"] == {"answered": 6} and model["math_verify_accuracy"] is None
    assert [(each["name"], each["accuracy"]) for each in model["by_level"]] == [("1", 1.0), ("2", 0.0)]
    n_tokens = sum(row["n_tokens"] for row in table(home / "whole")[1:])
    assert model["tokens_per_solved"] == n_tokens / 4
    after = {path.name: path.read_bytes() for path in (home / "whole").iterdir()}
    assert after == before, "a report that is made again is the same, byte by byte"


def test_the_page_loads_nothing_and_escapes_what_comes_from_files(home: Path) -> None:
    page = (home / "whole" / "report.html").read_text()
    seen: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            seen.append(tag)
            assert not {"src", "href", "onload"} & {name for name, _ in attributes}

    Tags().feed(page)
    assert {"svg", "pre"} <= set(seen) and not {"script", "link", "img", "b"} & set(seen)
    assert "&lt;b&gt;products&lt;/b&gt;" in page and "default-src 'none'" in page


def test_a_folder_cut_at_any_byte_ends_up_the_same(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces cut between and within lines, rows missing, stale or there, reports missing: as after a kill -9."""
    whole, loaded = home / "whole", list[Any]()
    make = Reasoner.__init__
    monkeypatch.setattr(
        Reasoner, "__init__", lambda it, *args, **named: (loaded.append(weakref.ref(it)), make(it, *args, **named))[1]
    )
    good = (whole / "checkpoint.traces.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(good) if byte == 10]
    rng = random.Random(1)
    for n, cut in enumerate((ends[2], rng.randrange(ends[2], ends[4]), ends[5])):
        output = tmp_path / str(n)
        shutil.copytree(whole, output)
        (output / "checkpoint.traces.jsonl").write_bytes(good[:cut])
        if n % 2:
            (output / "checkpoint.rows.jsonl").unlink()
            (output / "report.json").unlink()
        arguments = [*command(home, "whole"), "--samples", "2"]
        arguments[arguments.index("--output") + 1] = str(output)
        assert main(arguments) == 0
        assert table(output) == table(whole), cut
        assert (output / "report.json").read_bytes() == (whole / "report.json").read_bytes()
        assert (output / "checkpoint.traces.jsonl").read_bytes()[: (good[:cut].rfind(b"\n") + 1)] == (
            good[: good[:cut].rfind(b"\n") + 1]
        ), "what was there is not drawn again"
    assert len(loaded) == 2, "where every sample is there no model is loaded"
    assert not any(reasoner() for reasoner in loaded), "each model has left the memory"


def test_an_interrupted_run_reports_what_there_is_and_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Results.write

    def interrupted(self: Results, line: Any) -> None:
        write(self, line)
        if line["index"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = [*command(home, "whole"), "--samples", "2", "--output", str(tmp_path / "new")]
    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", interrupted)
        code, out, err = run(capsys, *arguments)
    n_done = len(table(tmp_path / "new")) - 1
    assert code == 128 + signal.SIGTERM and n_done in (2, 3, 4, 5)
    assert f"interrupted: {n_done} of 6 samples; run it again to go on" in err and f"2 of {min(n_done, 3)} " in out
    assert main(arguments) == 0 and table(tmp_path / "new") == table(home / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "6"], "sampling.seed is 6, was 5"),
        (
            ["--temp", "0.5", "--max-tokens", "39"],
            "limits.max_tokens is 39, was 40; sampling.temperature is 0.5, was None",
        ),
        (["--instruction", "Think."], "instruction is 'Think.', was ''"),
        (["--limit", "2"], r"the problems \(file, offset, limit or levels\)"),
        (["--on-loop", "answer"], "thinking.on_loop is 'answer', was 'stop'"),
        (["--samples", "1"], "--samples is 1, .*whole has 2 of each problem"),
    ],
)
def test_settings_that_changed_are_refused_by_name(
    changed: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (home / "whole").iterdir()}
    code, out, err = run(capsys, *command(home, "whole"), "--samples", "2", *changed)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert {path.name: path.read_bytes() for path in (home / "whole").iterdir()} == before


def test_bad_input_is_named_before_a_weight_is_loaded_and_leaves_nothing(
    home: Path,
    known_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Reasoner, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    twice = tmp_path / "twice.jsonl"
    twice.write_text((json.dumps(SUMS[0]) + "\n") * 2)
    output = home / "new"
    for arguments, message in (
        (command(home, "new", POCKET, known_checkpoint), "has another tokenizer than"),
        (command(home, "new", POCKET, POCKET), "model names .*checkpoint twice"),
        (command(home, "new", tmp_path / "absent"), "there is no such folder"),
        ([*command(home, "new"), "--task", str(twice)], "has the id 'a', as has problem 1"),
        ([*command(home, "new"), "--task", "gsm8k"], "The task gsm8k needs its file.* as --data"),
        ([*command(home, "new"), "--samples", "0"], "--samples is 0"),
        ([*command(home, "new"), "--temp", "-1"], "--temp is -1"),
        ([*command(home, "new"), "--width", "0"], "--width is 0, expected"),
        ([*command(home, "new"), "--against", "4bit"], "--against is '4bit', expected one of checkpoint"),
        (["--output", str(output), "--limit", "3"], "--limit needs --task"),
        (["--output", str(output), "--temp", "0.3"], "--temp needs --task, or leave it out to report on --output"),
        (["--output", str(output), "--no-verify"], "--no-verify needs --task"),
        (["--output", str(output)], "holds no evaluation"),
        (["--output", str(home / "whole"), "--against", "4bit"], "--against is '4bit', expected one of checkpoint"),
        ([*command(home, "new"), "--output", str(tmp_path)], "a folder with other files"),
        ([*command(home, "new"), "--output", str(tmp_path / "no" / "where")], "there is no folder"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code in (1, 2) and out == "" and re.search(message, err), err
        assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["twice.jsonl"]
    assert sorted(path.name for path in home.iterdir()) == ["sums.jsonl", "whole"], "and no lock"


def test_a_model_without_sampling_or_template_is_told_before_it_is_loaded(
    home: Path,
    known_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise SourceError("stopped before it is loaded.")

    monkeypatch.setattr(Reasoner, "__init__", stopped)
    folder = tmp_path / "model"
    shutil.copytree(known_checkpoint, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    code, _, err = run(capsys, *command(home, "new", folder))
    assert (
        code == 1 and "warning: model names no sampling (generation_config.json), so it draws at temperature 1" in err
    )
    assert "names no sampling" not in run(capsys, *command(home, "new", folder), "--temp", "0.7")[2]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = run(capsys, *command(home, "new", folder))
    assert code == 1 and f"{folder}: The model folder has no chat template" in err and not (home / "new").exists()


def test_a_folder_killed_before_it_began_is_begun(home: Path, tmp_path: Path) -> None:
    task = read_task(str(home / "sums.jsonl"))
    setup = read_evaluation(home / "whole").setup
    (tmp_path / "problems.jsonl").write_text("half")
    (tmp_path / ".evaluation.json.7.tmp").write_text("half")
    evaluation, _ = begin(tmp_path, task, setup, samples=1, models=[])
    write_evaluation(evaluation)
    assert read_evaluation(tmp_path) == evaluation
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OptionError, match="a folder with other files"):
        begin(tmp_path, task, setup, samples=1, models=[])


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["/x/Bits", "/y/bits"], ["x-Bits", "y-bits"]),  # one file on a Mac's disk
        (["/x/a b", "/x/a-b", "/x/a-b-2"], ["a-b", "a-b-2", "a-b-2-2"]),
        (["..", "/x/.hidden", "/"], ["model", "hidden", "model-2"]),
    ],
)
def test_labels_are_names_of_files_and_unlike_each_other(names: list[str], labels: list[str]) -> None:
    assert models_module.chosen_labels(names) == labels


def test_a_model_keeps_its_label_whatever_is_named_beside_it(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "chosen_labels", lambda names: ["pocket-checkpoint"])
    monkeypatch.setattr(Reasoner, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, _ = run(capsys, *command(home, "whole"), "--samples", "2")
    assert code == 0 and "pocket-checkpoint" not in out
    assert [model.label for model in read_evaluation(home / "whole").models] == ["checkpoint"]


def test_damaged_files_are_named(home: Path, tmp_path: Path) -> None:
    for name, old, new, message in (
        ("evaluation.json", b'"samples": 2', b'"samples": 3', "the sha256 does not fit"),
        ("problems.jsonl", b'"7"', b'"8"', "holds other problems than evaluation.json says"),
        ("checkpoint.rows.jsonl", b'"sample": 0', b'"sample": "0"', "sample is '0', expected a whole number"),
    ):
        folder = tmp_path / name
        shutil.copytree(home / "whole", folder)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(old, new, 1))
        with pytest.raises(SourceError, match=message):
            judged_rows(read_evaluation(folder), "checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["models"][0].update(label="../whole/checkpoint"), "label is '../whole/checkpoint', exp"),
        (lambda values: values.update(models=5), "models is 5, expected"),
        (lambda values: values.update(samples="2"), "samples is '2', expected a whole number"),
        (lambda values: values["setup"]["settings"].pop("sampling"), "sampling"),
    ],
)
def test_a_strangers_evaluation_stays_in_its_folder(change: Any, message: str, home: Path, tmp_path: Path) -> None:
    values = json.loads((home / "whole" / "evaluation.json").read_text())
    change(values)
    del values["sha256"]
    values["sha256"] = sha256_json(values)
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    shutil.copy(home / "whole" / "problems.jsonl", tmp_path)
    with pytest.raises(SourceError, match=message):
        read_evaluation(tmp_path)


def test_a_verdict_is_kept_until_its_trace_is_another(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, judged = tmp_path / "copy", list[str]()
    shutil.copytree(home / "whole", folder)
    monkeypatch.setattr(rows_module, "judge_answer", lambda problem, answer: judged.append(answer) or (False, "new"))
    before = judged_rows(read_evaluation(folder), "checkpoint")
    assert judged == []
    place = next(place for place, row in enumerate(before) if row.answer is not None)
    path = folder / "checkpoint.traces.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines[place]["trace"]["answer"] = "77"  # as of one that was answered again
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = judged_rows(read_evaluation(folder), "checkpoint")
    assert judged == ["77"] and (after[place].answer, after[place].reason) == ("77", "new")
    assert [*after[:place], *after[place + 1 :]] == [*before[:place], *before[place + 1 :]]


def test_verdicts_of_other_judges_are_made_anew(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(home / "whole", folder)
    monkeypatch.setattr(rows_module, "judges", lambda: {"math-verify": "another"})
    monkeypatch.setattr(rows_module, "math_verify_verdicts", lambda problems, traces: [False] * len(problems))
    rows = judged_rows(read_evaluation(folder), "checkpoint")
    assert [row.is_disputed for row in rows] == [row.is_right for row in rows] and any(row.is_right for row in rows)
