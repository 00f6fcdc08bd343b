"""The chat as a person meets it: commands, several lines, Ctrl-C, pipes and a terminal."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import ENVIRONMENT, start

from qwq_mlx.chat import __main__ as command
from qwq_mlx.chat import reader
from qwq_mlx.chat.commands import COMMANDS, parse_line, think_tokens
from qwq_mlx.chat.reader import plain_reader, read_message
from qwq_mlx.cli.command import Command
from qwq_mlx.cli.signals import Interruption
from qwq_mlx.errors import FitError, OptionError
from qwq_mlx.generate.reasoner import Reasoner, load

Chat = Callable[..., tuple[int, str, str]]


def lines(text: str) -> reader.ReadLine:
    return plain_reader(io.StringIO(text), io.StringIO())


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one\n", ["one"]),
        ("one\\\ntwo\\\nthree\nfour\n", ["one\ntwo\nthree", "four"]),
        ('"""\n one\n\n  two\n"""\nfour\n', [" one\n\n  two", "four"]),
        ('"""one"""\n', ["one"]),
        ("one\\\n", ["one\n"]),
        ('"""\none\n', ["\none"]),
    ],
)
def test_a_message_is_a_line_or_a_block_of_lines(typed: str, expected: list[str]) -> None:
    read_line = lines(typed)
    assert [read_message(read_line, "> ") for _ in expected] == expected
    with pytest.raises(EOFError):
        read_message(read_line, "> ")


def test_every_command_is_parsed_and_every_other_refused() -> None:
    for name in COMMANDS:
        more = " 3" if name in ("/system", "/save", "/load", "/think") else ""
        assert parse_line(name + more).command == name
    assert parse_line("//x y").text == "/x y" and parse_line("//x").command == ""
    with pytest.raises(OptionError, match="There is no command '/x'"):
        parse_line("/x y")
    with pytest.raises(OptionError, match="/quit takes nothing behind it, found 'now'"):
        parse_line("/quit now")
    with pytest.raises(OptionError, match="/save needs more: /save FILE"):
        parse_line("/save")
    assert (think_tokens("off"), think_tokens("12")) == (None, 12)
    with pytest.raises(OptionError, match="/think is '-1', expected a number of tokens, or off"):
        think_tokens("-1")


def test_without_a_terminal_or_prompt_toolkit_lines_are_plain_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    started = Command(parser, parser.parse_args([]), Interruption(asks=False))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, readline=lambda size: "x\n"))
    assert command._reader(started)("> ") == "x"
    assert "stdin is no terminal" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda size: "y\n"))
    monkeypatch.setattr(command, "has_editing", lambda: False)
    assert command._reader(started)("> ") == "y"
    out, err = capsys.readouterr()
    assert "pip install 'qwq-mlx[chat]'" in err and out == ""


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Reasoner:
    return load(tiny_checkpoint)


@pytest.fixture
def chat(
    loaded: Reasoner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> Chat:
    """The command in this process, its model loaded once: exit code, stdout, stderr."""

    def call(typed: str, *given: str) -> tuple[int, str, str]:
        monkeypatch.setattr(command, "load_reasoner", lambda *_: loaded)
        stdin: Any = io.StringIO(typed)
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer := io.BytesIO(), write_through=True))
        code = command.main(["--seed", "4", "--max-tokens", "6", *given])
        return code, buffer.getvalue().decode(), capsys.readouterr().err

    return call


@pytest.mark.tiny
def test_answers_go_to_stdout_and_everything_else_to_stderr(chat: Chat, loaded: Reasoner) -> None:
    code, out, err = chat("one\n\n/stats\n/help\n/quit\nnever\n")
    from qwq_mlx.options import Limits, Sampling

    trace = loaded.generate("one", sampling=Sampling(seed=4), limits=Limits(max_tokens=6))
    assert (code, out) == (0, trace.text + "\n")
    assert "[512 left] > " in err and f"[{512 - len(trace.prompt_ids) - 6} left] > " in err
    assert "turn 1: prompt " in err and "6 of them thinking" in err and "positions left" in err
    assert all(name in err for name in COMMANDS)
    assert "(length: 6 tokens)" in err


@pytest.mark.tiny
def test_commands_reach_the_conversation(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    code, out, err = chat(
        f"/system Be kind.\none\n/retry\n/save {path}\n/load {path}\n/think 3\n/think off\n/nix\n/retry\n"
    )
    assert code == 0
    assert out.count("\n") >= 3
    assert "system prompt: Be kind." in err and f"saved: {path}" in err and f"2 messages from {path}" in err
    assert "thinking: 3 tokens" in err and "thinking: off" in err
    assert "error: There is no command '/nix'" in err
    assert '"Be kind."' in path.read_text()


@pytest.mark.tiny
def test_folded_thinking_is_one_line(chat: Chat) -> None:
    code, out, err = chat("/fold\none\n/fold\none\n")
    assert code == 0
    assert "(thought for 6 tokens, no answer)" in err and "thinking is shown in full" in err
    assert out.startswith("\n") and len(out) > 2, "nothing of the first answer, all of the second"


@pytest.mark.tiny
def test_flags_reach_the_conversation(chat: Chat, loaded: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = Reasoner.stream

    def noted(self: Reasoner, *arguments: Any, **named: Any) -> Any:
        seen.append(named)
        return real(self, *arguments, **named)

    monkeypatch.setattr(Reasoner, "stream", noted)
    given = ["--temp", "0.5", "--context", "300", "--think-tokens", "2", "--system-prompt", "S", "--max-tokens", "3"]
    assert chat("one\n", *given)[0] == 0
    options = seen[0]
    assert (options["sampling"].temperature, options["sampling"].seed) == (0.5, 4)
    assert (options["limits"].context, options["limits"].max_tokens) == (300, 3)
    assert options["thinking"].think_tokens == 2 and options["system_prompt"] == "S"
    code, _, err = chat("one\n", "--kv-bits", "8")
    assert code == 2 and "--kv-bits is 8, but heads of width 32" in err


@pytest.mark.tiny
def test_the_model_and_force_reach_the_loader(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *, limits: Any, force: bool, verify: bool, **_: Any) -> Any:
        raise FitError(f"{folder} {limits.context} {force}")

    monkeypatch.setattr("qwq_mlx.generate.reasoner.load", refused)
    assert command.main(["--model", str(tiny_checkpoint), "--context", "99", "--force"]) == 1
    assert f"error: {tiny_checkpoint} 99 True" in capsys.readouterr().err


@pytest.mark.tiny
def test_a_template_that_nobody_knows_is_warned_of_once_on_stderr(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())["chat_template"]
    digest = hashlib.sha256(template.encode() + b"\n").hexdigest()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer := io.BytesIO(), write_through=True))
    assert command.main(["--model", str(tiny_checkpoint), "--temp", "0", "--max-tokens", "2"]) == 0
    shown = capsys.readouterr().err
    warning = f"warning: the chat template (sha256 {digest}) is none that this package knows."
    assert shown.count(warning) == 1 and b"warning" not in buffer.getvalue()
    assert shown.index(warning) < shown.index(" left] > ")  # before the first question


@pytest.mark.tiny
def test_memory_that_runs_out_while_loading_exits_with_5(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 1048576 bytes.")

    monkeypatch.setattr("mlx.core.eval", fail)
    assert command.main(["--model", str(tiny_checkpoint)]) == 5
    assert "error: " in (err := capsys.readouterr().err) and "memory ran out while the weights were read" in err


@pytest.mark.tiny
def test_a_question_beyond_the_context_is_an_error_line_and_the_chat_goes_on(chat: Chat) -> None:
    code, out, err = chat(f"{'x' * 700}\none\n")
    assert code == 0 and out
    assert "error: The prompt is " in err and "The question was not taken; /back makes room" in err


@pytest.mark.tiny
def test_back_takes_a_turn_off_and_a_full_context_says_what_helps(
    chat: Chat, loaded: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = chat("one\n/back\n/back\n")
    assert code == 0 and out
    assert "taken off: one" in err and "error: There is no question yet; ask one first." in err
    n_prompt = len(loaded.stream("one").request.prompt_ids)
    code, out, err = chat("one\n", "--max-tokens", "9", "--context", str(n_prompt + 5))
    assert f"(context_full: {n_prompt + 5} of {n_prompt + 5} positions)" in err
    assert "the answer is kept as far as it came; /back makes room, or /save FILE" in err


@pytest.mark.tiny
def test_ctrl_c_ends_an_answer_and_at_the_prompt_only_the_line(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    n_shown = [0]
    real = command.show

    def interrupted(steps: Any, out: Any, *, is_silent: bool) -> None:
        n_shown[0] += 1
        if n_shown[0] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        real(steps, out, is_silent=is_silent)

    monkeypatch.setattr(command, "show", interrupted)
    code, _, err = chat("one\ntwo\n", "--max-tokens", "50")
    assert code == 0 and n_shown[0] == 2
    assert "(interrupted: the answer is kept" in err, "the first answer was cut, the second was not"
    assert err.count("(interrupted: the answer is kept") == 1


@pytest.mark.tiny
def test_at_a_terminal_lines_are_edited_and_the_prompt_shows_what_is_left(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("prompt_toolkit")
    main, side = pty.openpty()
    given = ["--model", str(tiny_checkpoint), "--max-tokens", "4", "--seed", "4"]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with (tmp_path / "text").open("wb") as text:
        streams = {"stdin": side, "stdout": text.fileno(), "stderr": side}
        process = start("qwq_mlx.chat", *given, environment=environment, **streams)
    os.close(side)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if select.select([main], [], [], 0.1)[0]:
                seen += os.read(main, 4096)
        assert text in seen, seen

    wait_for(b"left] >")
    os.write(main, b"\x03")
    wait_for(b"Ctrl-D ends the chat")
    os.write(main, b"onn\x7fe\r")
    wait_for(b"(length: 4 tokens)")
    seen = seen.partition(b"(length: 4 tokens)")[2]  # the next prompt may have come with it
    wait_for(b"left] >")
    os.write(main, b"/quit\r")
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "text").read_bytes()
    os.close(main)
    assert "one" in (tmp_path / "qwq_mlx" / "chat_history").read_text()
