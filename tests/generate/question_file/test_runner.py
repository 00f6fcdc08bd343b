"""A file of questions: wherever it is cut, the file of answers ends up as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import piped, run, start

from qwq_mlx.cli.terminal import batch_line
from qwq_mlx.errors import ConversionError, GenerationError, OptionError, SavingError, SourceError, TemplateLimitError
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.question_file import questions as module
from qwq_mlx.generate.question_file import results as results_module
from qwq_mlx.generate.question_file.questions import read_questions
from qwq_mlx.generate.question_file.results import Results, read_traces
from qwq_mlx.generate.question_file.runner import BatchProgress, QuestionFile, question_seed
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.model import prompt, template
from qwq_mlx.options import Limits, Sampling, Thinking

pytestmark = pytest.mark.tiny
LINES = [
    {"question": "x 数"},
    {"question": "y", "id": "second", "expected": "3"},
    {"messages": [{"role": "user", "content": "z"}], "expected": [1, None]},
    {"question": "long " * 300, "id": "too long"},
    {"question": "x 数", "id": 17},
]


@pytest.fixture(scope="module")
def reasoner(known_checkpoint: Path) -> Reasoner:
    return load(known_checkpoint)


def write_lines(path: Path, lines: list[Any] = LINES) -> Path:
    path.write_bytes(b"".join((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines))
    return path


def answered(
    reasoner: Reasoner, source: Path, output: Path, *, stop_after: int | None = None, **options: Any
) -> BatchProgress:
    settings: dict[str, Any] = {
        "sampling": Sampling(temperature=1.0, seed=5),
        "limits": Limits(max_tokens=6),
        "thinking": Thinking(),
        "width": 1,
    }
    with Results(output) as results:
        batch = QuestionFile(reasoner, read_questions(source), results, **(settings | options))

        def progress(stand: BatchProgress) -> None:
            if stand.n_done == stop_after:
                batch.stop()

        return batch.work(progress)


def compared(output: Path) -> list[dict[str, Any]]:
    """All but what was measured."""
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    for line in lines:
        assert ("measured" in line) == ("trace" in line)
        line.pop("measured", None)
    return lines


@pytest.fixture(scope="module")
def whole(reasoner: Reasoner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    stand = answered(reasoner, write_lines(folder / "in.jsonl"), folder / "out.jsonl")
    assert (stand.n_done, stand.n_total, stand.n_failed) == (5, 5, 1)
    return folder


def test_every_question_has_its_line_and_its_own_draws(whole: Path, reasoner: Reasoner) -> None:
    lines = list(read_traces(whole / "out.jsonl"))
    assert [line["id"] for line, _ in lines] == [0, "second", 2, "too long", 17]
    assert [line["expected"] for line, _ in lines] == [None, "3", [1, None], None, None]
    first, last = lines[0][1], lines[4][1]
    assert first is not None and last is not None
    assert first.prompt_ids == last.prompt_ids and first.ids != last.ids
    assert lines[3][1] is None and "the context is 512" in lines[3][0]["error"]
    alone = reasoner.generate(
        "x 数", sampling=Sampling(temperature=1.0, seed=question_seed(5, 4)), limits=Limits(max_tokens=6)
    )
    assert last.ids == alone.ids and last.settings["sampling"]["seed"] == question_seed(5, 4)


def test_a_file_cut_at_any_byte_goes_on_to_the_same_lines(whole: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    good, expected = (whole / "out.jsonl").read_bytes(), compared(whole / "out.jsonl")
    output = tmp_path / "out.jsonl"
    ends = [place + 1 for place, byte in enumerate(good) if byte == 10]
    cuts = {0, len(good), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    rng = random.Random(7)
    for cut in sorted(cuts | {rng.randrange(len(good)) for _ in range(3)}):
        output.write_bytes(good[:cut])
        stand = answered(reasoner, whole / "in.jsonl", output)
        assert stand.n_before == good[:cut].count(b"\n")
        assert compared(output) == expected, cut
        kept = ends[stand.n_before - 1] if stand.n_before else 0
        assert output.read_bytes()[:kept] == good[:kept], "what was there is not written again"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"], "the lock is gone"


@pytest.mark.parametrize("width", [2, 3, None])
@pytest.mark.parametrize("stop_after", [None, 1, 2])
def test_the_file_is_the_same_in_any_width(
    width: int | None, stop_after: int | None, whole: Path, reasoner: Reasoner, tmp_path: Path
) -> None:
    answered(reasoner, whole / "in.jsonl", tmp_path / "out", stop_after=stop_after, width=width)
    lines, expected = compared(tmp_path / "out"), compared(whole / "out.jsonl")
    assert lines == expected[: len(lines)] and len(lines) >= (5 if stop_after is None else stop_after)
    answered(reasoner, whole / "in.jsonl", tmp_path / "out", width=width)
    assert compared(tmp_path / "out") == expected


def test_lines_wait_for_those_before_them(whole: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    """A question in which memory runs out beside others costs the others, too, and all are tried again."""
    module = type(reasoner.model.module)
    real, failed = module.__call__, list[int]()

    def call(self: Any, ids: Any, **options: Any) -> Any:
        if len(ids) > 1 and not failed:  # the first pass that rows share
            failed.append(len(ids))
            raise RuntimeError("[malloc] Unable to allocate 1048576 bytes.")
        return real(self, ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "__call__", call)
        stand = answered(reasoner, whole / "in.jsonl", tmp_path / "out", width=4)
    assert stand.n_out_of_memory > 1 and [line["index"] for line in compared(tmp_path / "out")] == [0, 1, 2, 3, 4]
    assert answered(reasoner, whole / "in.jsonl", tmp_path / "out", width=4).n_out_of_memory == 0
    assert compared(tmp_path / "out") == compared(whole / "out.jsonl")


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_a_stopped_batch_goes_on(n: int, whole: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    stand = answered(reasoner, whole / "in.jsonl", tmp_path / "out", stop_after=n)
    assert (stand.n_done, len(compared(tmp_path / "out"))) == (n, n)
    answered(reasoner, whole / "in.jsonl", tmp_path / "out")
    assert compared(tmp_path / "out") == compared(whole / "out.jsonl")


def test_a_drawn_seed_is_the_files_from_then_on(whole: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    open_seed = {"sampling": Sampling(temperature=1.0)}
    answered(reasoner, whole / "in.jsonl", tmp_path / "out", stop_after=2, **open_seed)
    answered(reasoner, whole / "in.jsonl", tmp_path / "out", **open_seed)
    seed = compared(tmp_path / "out")[0]["run"]["settings"]["sampling"]["seed"]
    answered(reasoner, whole / "in.jsonl", tmp_path / "again", sampling=Sampling(temperature=1.0, seed=seed))
    assert compared(tmp_path / "out") == compared(tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=1.0, seed=6)}, "seed"),
        ({"sampling": Sampling(temperature=0.5, seed=5)}, "temperature"),
        ({"limits": Limits(max_tokens=7, stop=("a",))}, "max_tokens, stop"),
        ({"thinking": Thinking(on_loop="off")}, "on_loop"),
        ({"system_prompt": "be brief"}, "system_prompt"),
    ],
)
def test_other_settings_are_never_mixed(
    options: dict[str, Any], message: str, whole: Path, reasoner: Reasoner, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    good = (whole / "out.jsonl").read_bytes()
    output.write_bytes(good)
    with pytest.raises(
        OptionError, match=f"out: question 0 was answered with other values of {message}. Run it with the same"
    ):
        answered(reasoner, whole / "in.jsonl", output, **options)
    assert output.read_bytes() == good


def test_other_questions_and_weights_are_refused(whole: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_bytes((whole / "out.jsonl").read_bytes())
    with pytest.raises(OptionError, match=r"question 1 \(id 'second'\) is another than the one answered there"):
        answered(reasoner, write_lines(tmp_path / "in", [LINES[0], LINES[1] | {"question": "Y"}, *LINES[2:]]), output)
    with pytest.raises(OptionError, match="holds 5 results, the input 4 questions"):
        answered(reasoner, write_lines(tmp_path / "in", LINES[:4]), output)
    more = write_lines(tmp_path / "in", [*LINES, {"question": "new"}])
    assert answered(reasoner, more, output).n_done == 6, "questions may be added at the end"
    half = load(reasoner.model.folder, compute_type="bfloat16")
    with pytest.raises(OptionError, match="other values of compute_type"):
        answered(half, more, output)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3 is not JSON"),
        (b"\xff", "line 3 is not UTF-8 at byte 0"),
        (b'{"question": "\\ud800"}', "line 3 holds the lone surrogate U.D800"),
        (b'{"question": "x", "expected": NaN}', "line 3 is not JSON .NaN is no JSON number"),
        (b"[]", "line 3 holds a JSON list, expected an object"),
        (b"[" * 100_000, "line 3 is not JSON .*recursion"),
        (b'{"question": ' + b"9" * 5000 + b"}", "line 3 is not JSON .*4300 digits"),
        (b'{"id": 3}', 'line 3 has neither "question" and "messages"'),
        (b'{"question": "x", "messages": []}', 'line 3 has both "question" and "messages"'),
        (b'{"question": "x", "id": 1.5}', "line 3 has the id 1.5, expected a text or a whole number"),
        (b'{"question": "x", "id": "a"}', "line 3 has the id 'a', as has line 1"),
        (b'{"question": 5}', "line 3: question is a int, expected a text"),
        (b'{"messages": "x"}', "line 3: messages is a str, expected a text, or a list"),
        (b'{"question": " "}', "line 3: .*empty"),
        (b'{"messages": [{"role": "god", "content": "x"}]}', "line 3: .*god"),
    ],
)
def test_damaged_input_is_refused_with_its_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"question": "x", "id": "a"}\n\n' + line + b"\n")
    with pytest.raises(SourceError, match=re.escape(str(path)) + ": " + message):
        read_questions(path)


def test_fields_of_data_sets_are_taken_or_ignored_and_each_is_told_once(tmp_path: Path) -> None:
    lines = [
        {"problem": "2+2", "answer": "4", "level": 3, "solution": "..."},
        {"prompt": "a\u2028b", "expected": "ours", "answer": "theirs", "level": 5},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "user", "content": "c", "name": "me"}], "prompt": "ignored"},
    ]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode())
    notes: list[str] = []
    questions = read_questions(path, note=notes.append)
    assert [each.messages for each in questions] == [
        "2+2",
        "a\u2028b",
        [{"role": "user", "content": "ab"}],
        [{"role": "user", "content": "c"}],
    ]
    assert [each.expected for each in questions] == ["4", "ours", None, None]
    assert sorted(each.removeprefix(f"{path}: ") for each in notes) == [
        "content as a list of text parts is joined",
        "the field 'answer' is taken as 'expected'",
        "the field 'level' is ignored",
        "the field 'name' of messages is ignored",
        "the field 'problem' is taken as 'question'",
        "the field 'prompt' is taken as 'question'",
        "the field 'solution' is ignored",
    ]


@pytest.mark.parametrize("names", [("prompt", "problem"), ("problem", "prompt")])
def test_of_two_names_for_the_question_the_first_in_the_line_counts(names: tuple[str, str], tmp_path: Path) -> None:
    """It was one or the other by the hashes of a process, so a file could not be gone on with."""
    path = write_lines(tmp_path / "in.jsonl", [{names[0]: "first", names[1]: "second"}])
    [question] = read_questions(path)
    assert question.messages == "first"


def test_input_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LINE_BYTES", 1000)
    with pytest.raises(SourceError, match="/dev/zero: line 1 ends beyond byte 1,001, expected lines of at most 1,000"):
        read_questions(Path("/dev/zero"))
    monkeypatch.setattr(module, "_MAX_BYTES", 2000)
    (tmp_path / "in.jsonl").write_bytes(b'{"question": "x"}\n' * 200)
    with pytest.raises(SourceError, match=r"ends beyond byte 2,016, expected .* and 2,000 in all"):
        read_questions(tmp_path / "in.jsonl")


def test_no_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(No such file"):
        read_questions(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"\n\n")
    with pytest.raises(SourceError, match="empty: holds no question"):
        read_questions(tmp_path / "empty")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[0], lines[1][:40] + b"\n", *lines[2:]], "line 2 is not JSON"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 is not the result of question 1"),
        (lambda lines: [lines[0], lines[0], *lines[1:]], "line 2 is not the result of question 1"),
        (lambda lines: [b"{}\n"], "line 1 is not the result of question 0"),
    ],
)
def test_damaged_output_is_refused_and_left_alone(damage: Any, message: str, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    bad = b"".join(damage((whole / "out.jsonl").read_bytes().splitlines(keepends=True)))
    output.write_bytes(bad)
    with pytest.raises(SourceError, match=f"out: {message}"), Results(output):
        pass
    assert output.read_bytes() == bad and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SourceError, match=message):
        list(read_traces(output))


def test_two_runs_on_one_output_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with Results(tmp_path / "out"), pytest.raises(ConversionError, match="is writing it"), Results(tmp_path / "out"):
        pass
    with pytest.raises(SourceError, match=r"there is no folder .*none\. Make it first"), Results(tmp_path / "none/out"):
        pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(SourceError, match=r"folder: cannot be written \(Is a directory\)"),
        Results(tmp_path / "folder"),
    ):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"pipe: cannot be written \(it is no regular"), Results(tmp_path / "pipe"):
        pass
    with pytest.raises(SourceError, match=r"gone: cannot be read \(No such file"):
        list(read_traces(tmp_path / "gone"))


def test_a_full_disk_keeps_the_lines_before(
    whole: Path, reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real, n_left = tmp_path / "out", os.pwrite, 2

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal n_left
        if n_left:
            n_left -= 1
            return real(fd, data, offset)
        real(fd, data[:9], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(results_module.os, "pwrite", full)
        # the lock writes with pwrite too: its line is the first of the two
        with pytest.raises(SavingError, match=r"line 2 cannot be written \(No space left on device\).* The lines"):
            answered(reasoner, whole / "in.jsonl", output)
    assert compared(output) == compared(whole / "out.jsonl")[:1]
    answered(reasoner, whole / "in.jsonl", output)
    assert compared(output) == compared(whole / "out.jsonl")


def test_logits_that_are_not_finite_fail_their_question_alone(
    whole: Path, known_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoner = load(known_checkpoint)
    real = reasoner.stream

    def not_finite(tokens: Any, logits: Any) -> Any:
        raise GenerationError("Step 0: NaN")

    def stream(messages: Any, **options: Any) -> Any:
        run = real(messages, **options)
        if messages == "y":
            monkeypatch.setattr(run.running.row, "hooks", (not_finite,))
        return run

    monkeypatch.setattr(reasoner, "stream", stream)
    stand = answered(reasoner, whole / "in.jsonl", tmp_path / "out")
    assert (stand.n_done, stand.n_failed) == (5, 2)
    lines, expected = compared(tmp_path / "out"), compared(whole / "out.jsonl")
    assert lines[1]["error"] == "Step 0: NaN" and lines[1]["error_type"] == "GenerationError"
    assert lines[1]["trace"]["ids"] == []
    good = (tmp_path / "out").read_bytes()
    monkeypatch.undo()
    assert answered(reasoner, whole / "in.jsonl", tmp_path / "out").n_failed == 2
    assert (tmp_path / "out").read_bytes() == good, "only what memory ran out in is tried again"
    assert lines[:1] + lines[2:] == expected[:1] + expected[2:]


@pytest.fixture
def short_of_memory(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Which questions, by their place among those asked from now on, memory runs out in at their third pass."""
    module, real = type(reasoner.model.module), type(reasoner.model.module).__call__
    real_stream, short, state = reasoner.stream, set(), {"question": -1, "pass": 0}

    def stream(*given: Any, **options: Any) -> Any:
        state["question"], state["pass"] = state["question"] + 1, 0
        return real_stream(*given, **options)

    def call(*given: Any, **options: Any) -> Any:
        state["pass"] += 1
        if state["question"] in short and state["pass"] == 3:
            raise RuntimeError("[malloc] Unable to allocate 1048576 bytes.")
        return real(*given, **options)

    monkeypatch.setattr(module, "__call__", call)
    monkeypatch.setattr(reasoner, "stream", stream)

    def let_run_out(questions: set[int]) -> None:
        state["question"] = -1
        short.clear()
        short.update(questions)

    return let_run_out


def test_what_memory_ran_out_in_is_tried_again_by_the_next_run(
    whole: Path, reasoner: Reasoner, tmp_path: Path, short_of_memory: Callable[[set[int]], None]
) -> None:
    """It was written down as its answer, for ever; the others go on meanwhile."""
    output, expected = tmp_path / "out", compared(whole / "out.jsonl")
    short_of_memory({0, 4})
    stand = answered(reasoner, whole / "in.jsonl", output)
    assert (stand.n_done, stand.n_failed, stand.n_out_of_memory) == (5, 3, 2)
    lines = compared(output)
    assert lines[1:4] == expected[1:4]
    for index in (0, 4):
        assert "memory ran out" in lines[index]["error"] and lines[index]["error_type"] == "OutOfMemoryError"
        assert len(lines[index]["trace"]["ids"]) < 6
    short_of_memory({1})  # the second that is asked: question 4 again
    stand = answered(reasoner, whole / "in.jsonl", output)
    assert (stand.n_before, stand.n_done, stand.n_failed, stand.n_out_of_memory) == (3, 5, 2, 1)
    assert compared(output)[:4] == expected[:4]
    assert compared(output)[4]["error_type"] == "OutOfMemoryError"
    short_of_memory(set())
    stand = answered(reasoner, whole / "in.jsonl", output)
    assert (stand.n_before, stand.n_done, stand.n_failed, stand.n_out_of_memory) == (4, 5, 1, 0)
    assert compared(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_question_that_is_tried_again_may_be_interrupted(
    whole: Path, reasoner: Reasoner, tmp_path: Path, short_of_memory: Callable[[set[int]], None]
) -> None:
    output = tmp_path / "out"
    short_of_memory({1})
    answered(reasoner, whole / "in.jsonl", output, stop_after=3)
    before = output.read_bytes()
    short_of_memory(set())
    stand = answered(reasoner, whole / "in.jsonl", output, stop_after=2)  # at once: two of the three lines count
    assert (stand.n_done, stand.n_failed) == (2, 0) and output.read_bytes() == before
    stand = answered(reasoner, whole / "in.jsonl", output, stop_after=3)
    assert compared(output) == compared(whole / "out.jsonl")[:3], "the one tried again comes first"
    answered(reasoner, whole / "in.jsonl", output)
    assert compared(output) == compared(whole / "out.jsonl")


@pytest.mark.parametrize("broken", ["open", "write", "replace"])
def test_a_line_that_cannot_be_written_again_leaves_the_file_as_it_was(
    broken: str,
    whole: Path,
    reasoner: Reasoner,
    tmp_path: Path,
    short_of_memory: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    short_of_memory({2})
    answered(reasoner, whole / "in.jsonl", output)
    before = output.read_bytes()
    short_of_memory(set())

    def full(*given: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        owner, name = {
            "open": (results_module.Path, "open"),
            "write": (results_module.shutil, "copyfileobj"),
            "replace": (results_module.Path, "replace"),
        }[broken]
        with Results(output) as results:
            batch = QuestionFile(
                reasoner,
                read_questions(whole / "in.jsonl"),
                results,
                sampling=Sampling(temperature=1.0, seed=5),
                limits=Limits(max_tokens=6),
                thinking=Thinking(),
            )
            patched.setattr(owner, name, full)
            with pytest.raises(SavingError, match=r"line 3 cannot be written \(No space left on device\)"):
                batch.work()
            patched.undo()
            short_of_memory(set())
            assert output.read_bytes() == before
            assert batch.work().n_out_of_memory == 0, "the file is still held, and takes the line now"
    assert compared(output) == compared(whole / "out.jsonl")


def test_what_a_kill_left_of_a_line_tried_again_is_removed(whole: Path, tmp_path: Path) -> None:
    output, left = tmp_path / "out", tmp_path / ".out.again"
    output.write_bytes((whole / "out.jsonl").read_bytes())
    left.write_bytes(b"half a file")
    with Results(output) as results:
        assert len(results.lines) == 5
    assert not left.exists()
    assert output.read_bytes() == (whole / "out.jsonl").read_bytes()


def test_the_command_ends_with_5_where_memory_ran_out_and_says_what_to_do(
    whole: Path,
    reasoner: Reasoner,
    tmp_path: Path,
    short_of_memory: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short_of_memory({1})
    monkeypatch.setattr(command, "load_reasoner", lambda *_, **__: reasoner)
    given = f"--input {whole / 'in.jsonl'} --output {tmp_path / 'out'} --seed 5 --temp 1 --width 1 --max-tokens 6"
    assert command.main(given.split()) == 5
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'out'}: 2 questions were not answered; see their 'error'. Memory ran out in 1: make room "
        "and run it again, which tries those again."
    )
    short_of_memory(set())
    assert command.main(given.split()) == 1, "the other one is too long for the context"
    assert "Memory" not in capsys.readouterr().err


def test_a_template_that_a_busy_machine_slows_down_is_no_answer(
    whole: Path, reasoner: Reasoner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = template.render, []

    def render(*given: Any) -> str:
        calls.append(given)
        if len(calls) == 2:
            raise TemplateLimitError("chat template: did not finish within 30 s.")
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(prompt, "render", render)
        with pytest.raises(TemplateLimitError):
            answered(reasoner, whole / "in.jsonl", tmp_path / "out")
    assert compared(tmp_path / "out") == compared(whole / "out.jsonl")[:1]
    answered(reasoner, whole / "in.jsonl", tmp_path / "out")
    assert compared(tmp_path / "out") == compared(whole / "out.jsonl")


def test_a_line_says_what_was_answered_how_far_the_file_is_and_how_fast() -> None:
    start = BatchProgress(
        n_done=2, n_total=10, n_before=2, n_failed=0, n_out_of_memory=0, n_tokens=0, seconds=0.0, last=None
    )
    assert batch_line(start) == "going on; 2 of 10 questions"
    trace = {"finish_reason": "stop", "ids": [1] * 1200}
    later = replace(start, n_done=6, n_failed=1, n_tokens=800, seconds=20.0, last={"id": "a", "trace": trace})
    assert batch_line(later) == "a: stop, 1,200 tokens; 6 of 10 questions, 1 failed, 40.0 tok/s"
    assert batch_line(replace(later, last={"id": 4, "error": "It broke."})).startswith("4: It broke.; 6 of 10")


def arguments(source: Path, output: Path, model: Path) -> list[str]:
    return f"--input {source} --output {output} --model {model} --seed 5 --temp 1 --max-tokens 6".split()


def test_the_command_killed_with_lines_on_the_disk_goes_on(whole: Path, known_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    given = arguments(whole / "in.jsonl", output, known_checkpoint)
    process = start("qwq_mlx.generate", *given)
    deadline = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run("qwq_mlx.generate", *given)
    assert done.returncode == 1 and done.stdout == b""
    assert b"out.jsonl: 1 questions were not answered" in done.stderr
    assert b"5 of 5 questions" in done.stderr
    assert compared(output) == compared(whole / "out.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--input", "x"], "error: --output is missing"),
        (["--output", "x"], "error: --input is missing"),
        (["--input", "x", "--output", "y", "-p", "z"], "error: --prompt applies to a single question"),
        (["--input", "x", "--output", "y", "--json"], "error: --json applies to a single question"),
        (["--input", "x", "--output", "y", "--resume", "z"], "error: --resume applies to a single question"),
        (["--input", "x", "--output", "y", "--save", "z"], "error: --save applies to a single question"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(given) == 2
    assert message in capsys.readouterr().err


def test_a_signal_ends_the_batch_with_its_lines_and_the_way_on(
    whole: Path, known_checkpoint: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"question": f"number {i}"} for i in range(400)])
    output = tmp_path / "out.jsonl"
    with piped("qwq_mlx.generate", *arguments(source, output, known_checkpoint)) as (process, _, stderr):
        assert b"1 of 400 questions" in stderr.readline()
        process.send_signal(signal.SIGTERM)
        rest = stderr.read().decode()
        code = process.wait(timeout=60)
    n_done = len(compared(output))
    assert code == 143 and 1 <= n_done < 400 and output.read_bytes().endswith(b"\n")
    assert rest.splitlines()[-1] == f"interrupted: {n_done} of 400 are in {output}; run it again to go on"


def test_a_width_without_questions_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["-p", "x", "--width", "2"]) == 2
    assert "--width needs --input FILE or --samples N." in capsys.readouterr().err
