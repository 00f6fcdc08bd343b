"""The generate command as a user meets it: text on stdout, the rest on stderr, each fault one message and a code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_json
from commands import ENVIRONMENT, piped, run, start

import qwq_mlx
from qwq_mlx import default_model
from qwq_mlx.generate import __main__ as command
from qwq_mlx.generate.reasoner import load
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny

SUMMARY = re.compile(
    r"(\w+): .+; prompt \d+ tokens at [\d,.]+ tok/s, output \d+ tokens( at [\d,.]+ tok/s)?, peak memory \d+\.\d\d GB"
)


MODULE = "qwq_mlx.generate"


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which is faster: exit code, stdout, stderr. An exception would be a traceback."""

    def call(*given: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(stdin)))
        try:
            code = command.main(given)
        except SystemExit as end:
            code = int(str(end.code))
        return code, *capfd.readouterr()

    return call


def test_text_goes_to_stdout_and_the_last_line_of_stderr_says_why_it_stopped(tiny_checkpoint: Path) -> None:
    done = run(
        MODULE, "--prompt", "Hé <|im_end|>", "--model", str(tiny_checkpoint), "--max-tokens", "12", "--seed", "5"
    )
    reasoner = load(tiny_checkpoint)
    trace = reasoner.generate("Hé <|im_end|>", sampling=Sampling(seed=5), limits=Limits(max_tokens=12))
    assert done.returncode == 0
    assert done.stdout.decode() == trace.text
    lines = done.stderr.decode().splitlines()
    assert "temperature 0.7, top-p 0.8, top-k 20, min-p 0, seed 5" in lines[-2]
    found = SUMMARY.fullmatch(lines[-1])
    assert found and found[1] == trace.finish_reason
    assert f"prompt {len(trace.prompt_ids)} tokens" in lines[-1] and f"output {len(trace.ids)} tokens" in lines[-1]


def test_json_prints_the_whole_trace_as_one_line(tiny_checkpoint: Path) -> None:
    done = run(
        MODULE,
        "-p",
        "-",
        "--model",
        str(tiny_checkpoint),
        "--max-tokens",
        "4",
        "--json",
        "--quiet",
        stdin=b"hi \xf0\x9f\xa7\xae\n",
    )
    assert done.stdout.count(b"\n") == 1
    trace = Trace.from_json(json.loads(done.stdout), where="stdout")
    assert len(trace.ids) == 4 and trace.finish_reason == "length"
    expected = load(tiny_checkpoint).stream("hi 🧮\n").trace().prompt_ids
    assert trace.prompt_ids == expected, "the prompt is never rewritten"
    assert SUMMARY.fullmatch(done.stderr.decode().strip()), "a run cut short says so even with --quiet"


def test_piped_stdin_is_the_prompt_when_none_is_given(
    tiny_checkpoint: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    _, out, _ = here("--model", str(tiny_checkpoint), "--max-tokens", "2", "--json", stdin=b"one\\n two")
    trace = json.loads(out)
    assert tuple(trace["prompt_ids"]) == load(tiny_checkpoint).stream("one\\n two").trace().prompt_ids


USAGE: list[tuple[Sequence[str], str]] = [
    (["-p", "x", "--temp", "-1"], r"error: --temp is -1\.0, expected a number from 0 to 100\."),
    (["-p", "x", "--top-p", "2"], r"error: --top-p is 2\.0, expected a number above 0 up to 1\."),
    (["-p", "x", "--top-k", "-1"], "error: --top-k is -1, expected a whole number of at least 0"),
    (["-p", "x", "--min-p", "nan"], "error: --min-p is nan"),
    (["-p", "x", "--max-tokens", "0"], "error: --max-tokens is 0, expected a whole number of at least 1"),
    (["-p", "x", "--context", "1"], "error: --context is 1"),
    (["-p", "x", "--seed", "-3"], "error: --seed is -3"),
    (["-p", "x", "--think-tokens", "-1"], "error: --think-tokens is -1"),
    (["-p", "x", "--stop", ""], "error: --stop holds an empty text"),
    (["-p", "x", "--logit-bias", "5"], "error: --logit-bias is '5', expected ID=NUMBER"),
    (["-p", "x", "--logit-bias", "5=nan"], r"error: logit_bias\[5\] is nan"),
    (["-p", ""], r"error: The prompt is empty\. Give a question"),
    (["-p", " \n"], "error: The prompt is empty"),
    (["-p", "-"], "error: The prompt is empty"),
    ([], "error: The prompt is empty"),
    (["-p", "x", "--save", "y", "--no-save"], "error: --save and --no-save are mutually exclusive."),
    (["-p", "x", "--temp", "warm"], "argument --temp: invalid float value: 'warm'"),
    (["-p", "x", "--temperature", "1"], "unrecognized arguments: --temperature 1"),
    (["-p", "x", "--max", "5"], "unrecognized arguments: --max 5"),
    (["-p", "x", "--order", "vllm"], "argument --order: invalid choice: 'vllm'"),
]


@pytest.mark.parametrize(("given", "message"), USAGE)
def test_wrong_usage_is_one_message_and_code_2(
    given: Sequence[str], message: str, here: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = here(*given)
    assert (code, out) == (2, ""), err
    assert re.search(message, err)


def test_wrong_usage_ends_the_process_before_anything_else_happens(tmp_path: Path) -> None:
    done = run(MODULE, "-p", "x", "--temp", "-1", "--model", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == "error: --temp is -1.0, expected a number from 0 to 100.\n"
    assert list(tmp_path.iterdir()) == []


def damaged(name: str, source: Path, folder: Path) -> Path:
    """A copy of the checkpoint with one fault; the name of the fault is the test's parameter."""
    if name == "missing":
        return folder
    if name == "file":
        folder.write_text("x")
        return folder
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    shard = folder / "model-00001-of-00002.safetensors"
    if name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif name == "other config":
        write_json(folder / "config.json", config | {"intermediate_size": 256})
    elif name == "absurd config":
        write_json(folder / "config.json", config | {"num_hidden_layers": 10_000_000})
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "garbage generation config":
        (folder / "generation_config.json").write_text("{")
    elif name == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


FOLDERS = [
    ("missing", "there is no such folder"),
    ("file", "is a file, expected a model folder"),
    ("empty folder", "config.json"),
    ("no config", "config.json"),
    ("no tokenizer", "tokenizer.json: there is no such file"),
    ("truncated shard", r"model-00001-of-00002\.safetensors"),
    ("other config", "the tensors are not those that config.json describes"),
    ("absurd config", "num_hidden_layers is 10000000"),
    ("garbage generation config", "generation_config.json"),
]


@pytest.mark.parametrize(("name", "message"), FOLDERS)
def test_a_wrong_model_folder_is_one_message_and_code_1(
    name: str, message: str, tiny_checkpoint: Path, tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    folder = damaged(name, tiny_checkpoint, tmp_path / "model")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, out, err = here("-p", "x", "--model", str(folder))
    assert (code, out) == (1, ""), err
    assert err.startswith(f"error: {folder}") and re.search(message, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_damaged_model_ends_the_process_with_code_1_and_no_traceback(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged("truncated shard", tiny_checkpoint, tmp_path / "model")
    done = run(MODULE, "-p", "x", "--model", str(folder), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith(f"error: {folder}") and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "stdin", "message", "code"),
    [
        (["-p", "word " * 600], b"", r"error: The prompt is [\d,]+ tokens, the context is 512", 1),
        (["-p", "x", "--context", "5000"], b"", "error: --context is 5,000, expected at most 512", 2),
        (["-p", "-"], b"\xff\xfe", r"error: stdin: byte 0 is not UTF-8, expected UTF-8 text", 1),
        (["-p", os.fsdecode(b"a\xff")], b"", r"error: Message 0: character 1 is the lone surrogate U\+DCFF", 1),
        (["-p", "x", "--logit-bias", "100000=1"], b"", "error: --logit-bias has the id 100,000", 2),
    ],
)
def test_what_this_model_cannot_do_is_one_message(
    given: Sequence[str],
    stdin: bytes,
    message: str,
    code: int,
    tiny_checkpoint: Path,
    here: Callable[..., tuple[int, str, str]],
) -> None:
    found, out, err = here(*given, "--model", str(tiny_checkpoint), stdin=stdin)
    assert (found, out) == (code, ""), err
    assert re.search(message, err)


def test_a_template_that_nobody_knows_is_warned_of_once_and_a_known_one_never(
    tmp_path: Path, tiny_checkpoint: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    model, questions = tmp_path / "model", tmp_path / "questions"
    shutil.copytree(tiny_checkpoint, model)
    questions.write_text('{"question": "one"}\n{"question": "two"}\n')
    one = ("-p", "x", "--temp", "0", "--max-tokens", "2", "--model", str(model))
    many = ("--input", str(questions), "--max-tokens", "2", "--model", str(model))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    digest = hashlib.sha256(settings["chat_template"].encode() + b"\n").hexdigest()
    warning = f"warning: the chat template (sha256 {digest}) is none that this package knows."
    code, text, shown = here(*one, "--save", str(tmp_path / "saved"))
    assert (code, shown.count(warning)) == (0, 1) and "warning" not in text
    assert shown.index(warning) < shown.index("greedy")  # before the question's own lines
    assert here(*many, "--output", str(tmp_path / "a"))[2].count(warning) == 1
    # with --quiet, and where the prompt is made already, nothing is said
    assert "warning" not in here(*one, "--quiet")[2] + here(*many, "--output", str(tmp_path / "b"), "--quiet")[2]
    resume = ("--resume", str(tmp_path / "saved"), "--max-tokens", "4", "--model", str(model))
    code, _, shown = here(*resume)
    assert code == 0 and "warning" not in shown
    pocket = Path(qwq_mlx.__file__).parent / "pocket" / "checkpoint" / "tokenizer_config.json"
    settings["chat_template"] = json.loads(pocket.read_text())["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, shown = here(*one)
    assert code == 0 and "warning" not in shown


def test_a_model_from_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("QWQ_MLX_MODEL", str(tmp_path / "none"))
    code, _, err = here("-p", "x")
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == f"model: {tmp_path / 'none'} (from $QWQ_MLX_MODEL)"
    assert lines[-1].startswith(f"error: {tmp_path / 'none'}: there is no such folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_cleanly_with_what_was_produced(
    number: signal.Signals, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    bans = [f"--logit-bias={i}=-inf" for i in load(tiny_checkpoint).model.stop_ids]
    given = ("-p", "x", "--model", str(tiny_checkpoint), "--temp", "0", *bans)
    with piped(MODULE, *given, cwd=tmp_path) as (process, out, err):
        shown = out.read(1)
        process.send_signal(number)
        shown, stderr = shown + out.read(), err.read()
        code = process.wait(timeout=60)
    assert b"Traceback" not in stderr
    last = SUMMARY.fullmatch(stderr.decode().strip().splitlines()[-1])
    assert last is not None and shown
    if last[1] == "context_full":  # a very fast machine was done before the signal
        pytest.skip("the run ended before the signal came")
    assert last[1] == "interrupted" and code == 128 + number


class _Poisoned:
    """A model whose logits become NaN after some passes."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._n_passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, ids: Any, cache: Any) -> Any:
        self._n_passes += 1
        return self._module(ids, cache=cache) * (mx.nan if self._n_passes > 8 else 1.0)


@pytest.mark.parametrize("given", [[], ["--json"]])
def test_logits_that_are_not_finite_are_one_message_and_nothing_shown_is_lost(
    given: list[str], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., tuple[int, str, str]]
) -> None:
    def poisoned(folder: Path, **options: Any) -> Any:
        reasoner = load(folder, **options)
        reasoner.model = replace(reasoner.model, module=_Poisoned(reasoner.model.module))
        return reasoner

    bans = [f"--logit-bias={i}=-inf" for i in load(tiny_checkpoint).model.stop_ids]
    monkeypatch.setattr("qwq_mlx.generate.reasoner.load", poisoned)
    code, out, err = here("-p", "x", "--model", str(tiny_checkpoint), "--seed", "1", *bans, *given)
    assert code == 4 and re.search(r"error: Step \d: the model's logits hold NaN or infinity", err), err
    if given:
        trace = Trace.from_json(json.loads(out), where="stdout")
        assert len(trace.ids) >= 5 and "logits hold NaN" in trace.detail
    else:
        assert out


def test_two_processes_at_once_answer_as_one_does(tiny_checkpoint: Path) -> None:
    given = ("-p", "x", "--model", str(tiny_checkpoint), "--seed", "4", "--max-tokens", "30")
    with piped(MODULE, *given) as (one, first, _), piped(MODULE, *given) as (other, second, _):
        texts = [first.read(), second.read()]
        codes = [one.wait(timeout=60), other.wait(timeout=60)]
    alone = load(tiny_checkpoint).generate("x", sampling=Sampling(seed=4), limits=Limits(max_tokens=30)).text
    assert [text.decode() for text in texts] == [alone, alone]
    assert codes == [0, 0]


def test_a_closed_stdout_ends_the_command_without_a_word(tiny_checkpoint: Path) -> None:
    with piped(MODULE, "-p", "x", "--model", str(tiny_checkpoint), "--quiet") as (process, stdout, stderr):
        stdout.close()
        assert (stderr.read(), process.wait(timeout=60)) == (b"", 0)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, which only Linux has")
@pytest.mark.parametrize("given", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_one_message(given: list[str], tiny_checkpoint: Path) -> None:
    given = ["-p", "x", "--model", str(tiny_checkpoint), "--max-tokens", "9", "--quiet", *given]
    with Path("/dev/full").open("wb") as full:
        done = run(MODULE, *given, stdout=full.fileno())
    expected = b"error: stdout: cannot be written (No space left on device). Make room, or send it elsewhere.\n"
    assert (done.returncode, done.stderr) == (3, expected)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_on_a_terminal_the_thinking_is_dimmed_and_escapes_are_shown_not_obeyed(
    environment: dict[str, str], tiny_checkpoint: Path
) -> None:
    leader, follower = pty.openpty()
    # the id of the byte ESC is drawn again and again
    given = ("-p", "x", "--model", str(tiny_checkpoint), "--temp", "0", "--max-tokens", "3")
    process = start(
        MODULE,
        *given,
        _bias_to("\x1b", tiny_checkpoint),
        stdout=follower,
        environment={**ENVIRONMENT, "TERM": "xterm", **environment},
    )
    assert process.wait(timeout=60) == 0
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    text = "\u241b\u241b\u241b"
    assert shown == (f"{text}\r\n" if environment else f"\x1b[2m{text}\x1b[0m\r\n")


def _bias_to(character: str, folder: Path) -> str:
    pieces = load(folder).pieces
    token_id = next(i for i in range(pieces.n_ids) if pieces[i] == character.encode())
    return f"--logit-bias={token_id}=1000"


def test_a_run_cut_short_is_saved_and_resumed(
    tiny_checkpoint: Path, tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    model, saved = ["--model", str(tiny_checkpoint)], str(tmp_path / "run")
    _, whole, _ = here("-p", "x", *model, "--seed", "3", "--max-tokens", "40")
    code, first, err = here("-p", "x", *model, "--seed", "3", "--max-tokens", "15", "--save", saved)
    assert code == 0 and f"saved: go on with --resume {saved}" in err
    code, rest, err = here("--resume", saved, *model, "--max-tokens", "40")
    assert code == 0 and re.search("^(length|stop): .*prompt [0-9]+ tokens, output", err.splitlines()[-1])  # no prefill
    # what was held back for an unfinished character at the cut is shown again as part of it
    assert (first + rest == whole) or "\ufffd" in first
    assert here("--resume", str(tmp_path / "none"), *model)[0] == 1


@pytest.mark.parametrize(
    "given", [["-p", "y"], ["--temp", "1"], ["--stop", "a"], ["--think-tokens", "5"], ["--system-prompt", "s"]]
)
def test_settings_beside_resume_are_refused(given: list[str], here: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = here("--resume", "run", *given)
    assert (code, out) == (2, "") and err.startswith("error: --resume goes on with the settings of the file")


FLAGS: list[tuple[list[str], str, Any]] = [
    (["--temp", "0.5"], "temperature", 0.5),
    (["--top-p", "0.5"], "top_p", 0.5),
    (["--top-k", "7"], "top_k", 7),
    (["--min-p", "0.1"], "min_p", 0.1),
    (["--repetition-penalty", "1.1"], "repetition_penalty", 1.1),
    (["--presence-penalty", "0.2"], "presence_penalty", 0.2),
    (["--frequency-penalty", "0.3"], "frequency_penalty", 0.3),
    (["--dry-multiplier", "0.8"], "dry_multiplier", 0.8),
    (["--dry-base", "2"], "dry_base", 2.0),
    (["--dry-allowed-length", "4"], "dry_allowed_length", 4),
    (["--logit-bias", "3=-1", "--logit-bias", "4=-inf"], "logit_bias", {3: -1.0, 4: float("-inf")}),
    (["--order", "mlx-lm"], "order", "mlx-lm"),
    (["--seed", "9"], "seed", 9),
    (["--max-tokens", "11"], "max_tokens", 11),
    (["--context", "99"], "context", 99),
    (["--kv-bits", "8"], "kv_bits", 8),
    (["--kv-bits", "auto"], "kv_bits", "auto"),
    (["--prefill-step", "64"], "prefill_step", 64),
    (["--force"], "force", True),
    (["--no-verify"], "verify", False),
    (["--chat-template", "chat.jinja"], "chat_template", "chat.jinja"),
    (["--follow-links"], "follow_links", True),
    (["--stop", "END", "--stop", "FIN"], "stop", ("END", "FIN")),
    (["--ban", "a b", "--ban", "c"], "banned", ("a b", "c")),
    (["--think-tokens", "100"], "think_tokens", 100),
    (["--language-guard"], "language_guard", True),
    (["--on-loop", "nudge"], "on_loop", "nudge"),
    (["--answer-tokens", "50"], "answer_tokens", 50),
    (["--system-prompt", "Be brief."], "system_prompt", "Be brief."),
    (["-p", "What?"], "messages", "What?"),
    (["--model", "/somewhere"], "folder", Path("/somewhere")),
]


class _ReachedError(Exception):
    """Carries what the command handed to the reasoner."""


@pytest.mark.parametrize(("flag", "name", "expected"), FLAGS)
def test_every_flag_reaches_the_code_it_names(
    flag: list[str], name: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_load(
        folder: Path,
        *,
        limits: Limits,
        force: bool,
        verify: bool,
        chat_template: Any,
        follow_links: bool,
        reproducible: bool,
        draft: Any,
        draft_length: Any,
        group: Any,
        split: Any,
        progress: Any,
    ) -> Any:
        def stream(
            messages: str, *, system_prompt: Any, sampling: Sampling, limits: Limits, thinking: Thinking, progress: Any
        ) -> None:
            values = {each: getattr(sampling, each) for each in Sampling.__slots__}
            values |= {each: getattr(limits, each) for each in Limits.__slots__}
            values |= {each: getattr(thinking, each) for each in Thinking.__slots__}
            given = {"messages": messages, "system_prompt": system_prompt, "folder": folder, "force": force}
            given |= {"verify": verify, "chat_template": chat_template, "follow_links": follow_links}
            raise _ReachedError(values | given)

        tokenizer = SimpleNamespace(chat_template=None)
        model = SimpleNamespace(tokenizer=tokenizer, warnings=(), has_manifest=False)
        return SimpleNamespace(stream=stream, model=model, drafts=None)

    monkeypatch.setattr("qwq_mlx.generate.reasoner.load", fake_load)
    given = ["-p", "x", "--model", "m", *flag]
    with pytest.raises(_ReachedError) as reached:
        command.main(given)
    values = reached.value.args[0]
    assert values.pop(name) == expected
    with pytest.raises(_ReachedError) as untouched:
        command.main(["-p", "x", "--model", "m"])
    others = untouched.value.args[0]
    assert others.pop(name) != expected
    assert values == others, "a flag changes only what it names"


def test_help_names_every_flag_and_answers_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys, qwq_mlx.generate.__main__ as m\n"
        "try:\n    m.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'mlx', 'mlx.core', 'mlx_lm', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for flags, *_ in FLAGS:
        assert flags[0] in done.stdout
    for flag in ("--json", "--quiet", "--save", "--resume"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "q.jsonl", "--output", "q.jsonl"], "--output is 'q.jsonl', which is read by the same command"),
        (["--input", "q.jsonl", "--output", "hard"], "--output is 'hard', which is read by the same command"),
        (["--input", "q.jsonl", "--output", "notes"], "notes: ends in a line that is no result and has no newline"),
        (["-p", "x", "--save", "{model}/model.safetensors.index.json"], "which lies in the model's folder"),
        (["-p", "x", "--receipt", "{model}/new"], "which lies in the model's folder"),
        (["-p", "x", "--save", "one", "--receipt", "one"], "receipt and save are both 'one'"),
        (["-p", "x", "--save", ""], "--save is '', which is empty"),
        (["-p", "x", "--save", "pipe"], "--save is 'pipe', which is a device, a pipe or a socket"),
        (["-p", "x", "--receipt", "."], "--receipt is '.', which is a folder"),
        (["-p", "x", "--save", "f" * 248], "--save has a name of 248 bytes, expected at most 223"),
    ],
)
def test_no_file_that_is_somebodys_is_written_and_none_is_found_out_after_the_run(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """The questions were destroyed, a note of one line emptied, weights and devices replaced by a saved run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(default_model, "ready_model", lambda *_: pytest.fail("a model was loaded"))
    Path("q.jsonl").write_text('{"question": "x"}\n')
    Path("hard").hardlink_to("q.jsonl")
    Path("notes").write_text("my notes")
    os.mkfifo("pipe")
    before = {path.name: path.lstat().st_size for path in tmp_path.iterdir()}
    model = [each.name for each in tiny_checkpoint.iterdir()]
    given = [each.format(model=tiny_checkpoint) for each in arguments]
    assert command.main(["--model", str(tiny_checkpoint), *given]) in (1, 2)
    assert message in capsys.readouterr().err
    assert {path.name: path.lstat().st_size for path in tmp_path.iterdir()} == before
    assert [each.name for each in tiny_checkpoint.iterdir()] == model


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("module", ["fit --ram 16", "fit --json"])
def test_a_full_disk_behind_stdout_is_exit_code_3(module: str) -> None:
    name, *given = module.split()
    with Path("/dev/full").open("wb") as full:
        done = run(f"qwq_mlx.{name}", *given, stdout=full.fileno())
    expected = b"error: stdout: cannot be written (No space left on device). Make room, or send it elsewhere.\n"
    assert done.returncode == 3 and done.stderr.endswith(expected) and b"Traceback" not in done.stderr
