"""`python -m qwq_mlx.chat`: a conversation at the terminal; the model's text on stdout, everything else on stderr.

Ctrl-C during an answer ends the answer, not the chat. Lines may also be piped in, one message a line.

Does not: shorten the conversation when the context is full, or write anything unasked but the history of typed lines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_mlx.chat.commands import COMMANDS, parse_line, think_tokens
from qwq_mlx.chat.folding import folded
from qwq_mlx.chat.reader import ReadLine, editing_reader, has_editing, plain_reader, read_message
from qwq_mlx.cli.command import Command, end_verification, load_reasoner, make_parser, run_command
from qwq_mlx.cli.generate_flags import add_loading, bits
from qwq_mlx.cli.on_hosts import or_on_hosts
from qwq_mlx.cli.terminal import show
from qwq_mlx.errors import DamagedModelError, GenerationError, PromptError, QwqError, RankError
from qwq_mlx.files.output_file import check_output_file
from qwq_mlx.options import Limits, Sampling, Thinking

if TYPE_CHECKING:
    from qwq_mlx.chat.conversation import Conversation, Turn
    from qwq_mlx.generate.stream import Stream

_MORE_ROOM = "/back makes room, or /save FILE, start again with a larger --context and /load FILE"
_ENDED = (129, 143)  # the terminal was closed, or the process was asked to end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, or_on_hosts(_chat), interrupted=lambda options: "")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "chat",
        description="Interactive chat. A line is a message; a backslash at its end, or three double quotes around it, "
        "make it several lines. /help shows the commands.",
        exit_codes="0 ended, 1 failed, 2 wrong usage, 5 memory ran out while loading, 129 terminal closed, 143 "
        "terminated",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (default: as python -m qwq_mlx.generate)")
    add("--system-prompt", metavar="TEXT", help="system prompt (default: the chat template's)")
    add("--temp", type=float, metavar="T", dest="temperature", help="temperature; 0 is greedy (default: the model's)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="random seed of the first turn, counted up in later ones (default: random)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of a reply (default: what the context leaves)",
    )
    add("--think-tokens", type=int, metavar="N", help="ask for the answer after N tokens of thinking")
    add(
        "--context",
        type=int,
        metavar="N",
        help="context length of the whole conversation in tokens (default: the model's own)",
    )
    add(
        "--kv-bits",
        type=bits,
        choices=(8, 4, "auto"),
        help="bits of a quantized KV cache (default: off)",
    )
    add_loading(add)
    return parser


def _chat(command: Command) -> int:
    options = command.options
    sampling = Sampling(temperature=options.temperature, seed=options.seed)
    limits = Limits(max_tokens=options.max_tokens, context=options.context, kv_bits=options.kv_bits)
    thinking = Thinking(think_tokens=options.think_tokens)
    reasoner = load_reasoner(command, limits)
    from qwq_mlx.chat.conversation import Conversation

    talk = Conversation(
        reasoner, system_prompt=options.system_prompt, sampling=sampling, limits=limits, thinking=thinking
    )
    code = _Chat(talk, command).hold(_reader(command))
    end_verification(command, reasoner)
    return code


def _reader(command: Command) -> ReadLine:
    if not sys.stdin.isatty():
        command.note("stdin is no terminal: one message a line, no editing")
        return plain_reader(sys.stdin, sys.stderr)
    if not has_editing():
        command.note("no history and editing: pip install 'qwq-mlx[chat]' (prompt_toolkit) gives them")
        return plain_reader(sys.stdin, sys.stderr)
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return editing_reader(sys.stderr, state / "qwq_mlx" / "chat_history")


class _Chat:
    """The loop: read, answer, read."""

    def __init__(self, talk: Conversation, command: Command) -> None:
        self._talk = talk
        self._command = command
        self._interruption = command.interruption
        self._is_folded = False
        self._is_over = False

    def hold(self, read_line: ReadLine) -> int:
        """Until /quit or the end of input; returns the exit code."""
        self._note(f"{self._talk.reasoner.model.name}: /help shows the commands, /quit ends")
        while not self._is_over:
            try:
                self._take(read_message(read_line, f"[{self._talk.n_left:,} left] > "))
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._interruption.exit_code in _ENDED:
                    return self._interruption.exit_code
                self._interruption.exit_code = 0
                self._note("(/quit or Ctrl-D ends the chat)")
        return 0

    def _take(self, text: str) -> None:
        """Carry out one message; what is wrong with it is told, and the chat goes on."""
        if not text.strip():
            return
        try:
            line = parse_line(text)
            action = getattr(self, f"_do_{line.command.removeprefix('/')}") if line.command else self._do_ask
            action(line.text)
        except (DamagedModelError, RankError):
            raise  # every further answer would be wrong, or fail, too
        except QwqError as error:
            self._note(f"error: {self._command.explain(error)}")

    def _do_ask(self, text: str) -> None:
        try:
            self._answer(self._talk.ask(text))
        except PromptError as error:
            raise PromptError(f"{error} The question was not taken; {_MORE_ROOM}.") from error

    def _do_retry(self, _: str) -> None:
        self._answer(self._talk.retry())

    def _do_back(self, _: str) -> None:
        self._note(f"taken off: {self._talk.back()}")

    def _do_system(self, text: str) -> None:
        if text:
            self._talk.system_prompt = text
        self._note(f"system prompt: {self._talk.system_prompt or '(the template has its own)'}")

    def _do_save(self, text: str) -> None:
        check_output_file(text, name="The file", folders=[self._talk.reasoner.model.folder])
        self._talk.save(Path(text))
        self._note(f"saved: {text}")

    def _do_load(self, text: str) -> None:
        self._talk.load(Path(text))
        self._note(f"{len(self._talk.messages)} messages from {text}")

    def _do_think(self, text: str) -> None:
        self._talk.thinking = replace(self._talk.thinking, think_tokens=think_tokens(text))
        self._note(f"thinking: {text if text == 'off' else f'{text} tokens'}")

    def _do_fold(self, _: str) -> None:
        self._is_folded = not self._is_folded
        self._note(f"thinking is shown {'as one line' if self._is_folded else 'in full'}")

    def _do_stats(self, _: str) -> None:
        for number, turn in enumerate(self._talk.turns, start=1):
            self._note(f"turn {number}: {_cost(turn)}")
        self._note(f"context: {self._talk.n_left:,} of {self._talk.context:,} positions left")

    def _do_help(self, _: str) -> None:
        for name, text in COMMANDS.items():
            self._note(f"{name:<8} {text}")

    def _do_quit(self, _: str) -> None:
        self._is_over = True

    def _answer(self, run: Stream) -> None:
        """Show one answer; Ctrl-C ends it and it is kept as far as it came."""
        if run.request.note and not self._talk.turns:
            self._note(run.request.note)
        self._interruption.run = run
        try:
            show(folded(run, self._note, _report) if self._is_folded else run, sys.stdout, is_silent=False)
        except GenerationError:
            self._talk.drop_last()
            raise
        finally:
            self._interruption.run = None
        if not sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()
        turn = self._talk.close(run)
        if turn.finish_reason not in ("stop", "answered"):
            self._note(f"({turn.finish_reason}: {run.trace().detail or 'the answer is kept as far as it came'})")
        if turn.finish_reason == "context_full":
            self._note(f"(the answer is kept as far as it came; {_MORE_ROOM})")
        if self._interruption.exit_code in _ENDED:
            raise KeyboardInterrupt
        self._interruption.exit_code = 0

    def _note(self, text: str) -> None:
        self._command.note(text)


def _report(text: str) -> None:
    """How far the folded thinking is, on a line of the terminal that the next text writes over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _cost(turn: Turn) -> str:
    rate = f" at {(turn.n_output - 1) / turn.decode_s:,.1f} tok/s" if turn.decode_s > 0 and turn.n_output > 1 else ""
    return (
        f"prompt {turn.n_prompt:,} tokens, {turn.n_fed:,} of them new in {turn.prefill_s:.2f} s; "
        f"output {turn.n_output:,} tokens{rate}, {turn.n_thinking:,} of them thinking; {turn.finish_reason}"
    )


if __name__ == "__main__":
    sys.exit(main())
