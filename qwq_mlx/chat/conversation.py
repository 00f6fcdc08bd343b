"""A conversation: the messages, and the run of the last turn, whose KV cache the next turn goes on from.

Every turn's prompt is the template over the whole conversation, exactly as without a cache; what the cache holds of
those ids is not computed again. So the system block and all earlier turns are fed once, and where the text of an answer
makes other ids than those that were drawn, feeding starts again at the first that differs.

Does not: read input, print, or shorten a conversation that has outgrown the context (the next question is refused).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from qwq_mlx.errors import OptionError, PromptError, SourceError, system_said
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.prompt import conversation, prompt_ids
from qwq_mlx.options import Limits, Sampling, Thinking

__all__ = ["Conversation", "Turn"]

_SCHEMA = 1
_MAX_BYTES = 64 << 20  # 32,768 tokens of text take less than 1 MB
_ADVICE = "Give a file that /save wrote."
_ANY = 1 << 31  # a context that nothing is too long for


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a turn cost. n_prompt: ids of the whole conversation before it; n_fed: those that had to be computed."""

    n_prompt: int
    n_fed: int
    n_output: int
    n_thinking: int
    prefill_s: float
    decode_s: float
    finish_reason: str


class Conversation:
    """`run = ask(text)`, iterate over it, `close(run)`; then the next question.

    sampling.seed: of the first turn, each further one takes the next number; None draws one for every turn.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        *,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        self.reasoner = reasoner
        self.system_prompt = system_prompt
        self.thinking = thinking or Thinking()
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        self._sampling = sampling or Sampling()
        self._limits = limits or Limits()
        self._context = reasoner.fit(self._limits).limits.context or 0
        self._before: Stream | None = None
        self._n_used = 0
        self._n_asked = 0

    @property
    def context(self) -> int:
        """Positions there are."""
        return self._context

    @property
    def n_left(self) -> int:
        """Positions that the turns so far leave."""
        return self._context - self._n_used

    def ask(self, text: str) -> Stream:
        """Start the next turn. Raises PromptError, and the conversation is as before."""
        messages = [*self.messages, {"role": "user", "content": text}]
        run = self._started(messages)
        self.messages = messages
        return run

    def retry(self) -> Stream:
        """Take the last answer back and draw another one, with other random numbers.

        Raises OptionError where nothing was asked yet.
        """
        messages = self._up_to_question()
        run = self._started(messages)
        self.messages = messages
        return run

    def back(self) -> str:
        """Take the last question and its answer off; returns the question. Raises OptionError where there is none."""
        messages = self._up_to_question()
        question = messages.pop()
        self.messages, self._n_used = messages, self._n_held(messages, self.system_prompt)
        return question["content"]

    def close(self, run: Stream) -> Turn:
        """Take the answer, whole or cut short, into the conversation."""
        trace = run.trace()
        self.messages.append({"role": "assistant", "content": trace.text})
        self._n_used = len(trace.prompt_ids) + len(trace.ids)
        turn = Turn(
            n_prompt=len(trace.prompt_ids),
            n_fed=len(trace.prompt_ids) - run.n_cached,
            n_output=len(trace.ids),
            n_thinking=trace.thinking_span[1] - trace.thinking_span[0],
            prefill_s=trace.timings.prefill_s,
            decode_s=trace.timings.decode_s,
            finish_reason=trace.finish_reason,
        )
        self.turns.append(turn)
        return turn

    def drop_last(self) -> None:
        """Forget the last question, where its answer failed."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _up_to_question(self) -> list[dict[str, str]]:
        messages = list(self.messages)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise OptionError("There is no question yet; ask one first.")
        return messages

    def _n_held(self, messages: list[dict[str, str]], system_prompt: str | None) -> int:
        """Positions that the messages take; at most all, for the last answer may have filled them."""
        if not any(message["role"] == "user" for message in messages):
            return 0
        tokenizer = self.reasoner.model.tokenizer
        return min(self._context, len(prompt_ids(tokenizer, messages, system_prompt=system_prompt, context=_ANY)))

    def save(self, path: Path) -> None:
        """Write system prompt and messages as JSON; the file appears whole or not at all."""
        value = {"schema_version": _SCHEMA, "system_prompt": self.system_prompt, "messages": self.messages}
        try:
            write_file(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise SourceError(f"{path}: cannot be written {system_said(error, 'Give another place.')}") from error

    def load(self, path: Path) -> None:
        """Go on with a conversation that `save` wrote.

        Raises SourceError, or PromptError where the context does not hold it up to its last question; this one is then
        as before.
        """
        saved = _read(path)
        system_prompt, messages = saved.system_prompt, [asdict(message) for message in saved.messages]
        asked = messages[: -1 if messages and messages[-1]["role"] == "assistant" else None]
        if asked:  # the last answer may have filled the context, and /retry and /back still work then
            tokenizer = self.reasoner.model.tokenizer
            prompt_ids(tokenizer, asked, system_prompt=system_prompt, context=self._context)
        n_used = self._n_held(messages, system_prompt)
        self.system_prompt, self.messages, self.turns, self._n_used = system_prompt, messages, [], n_used

    def _started(self, messages: list[dict[str, str]]) -> Stream:
        sampling = self._sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + self._n_asked) % 2**64)
        run = self.reasoner.stream(
            messages,
            system_prompt=self.system_prompt,
            sampling=sampling,
            limits=self._limits,
            thinking=self.thinking,
            before=self._before,
        )
        self._before = run
        self._n_asked += 1
        return run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """One turn of a saved conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """The file of a conversation."""

    schema_version: int
    system_prompt: str | None
    messages: tuple[_Message, ...]


def _read(path: Path) -> _Saved:
    """A saved conversation, checked. Raises SourceError naming file, field, found and expected."""
    value = read_json_object(path, limit_bytes=_MAX_BYTES, advice=_ADVICE)
    if value.get("schema_version") != _SCHEMA:
        raise SourceError(
            f"{path}: schema_version is {value.get('schema_version')!r}, expected {_SCHEMA}, a conversation. {_ADVICE}"
        )
    try:
        saved = from_json_value(value, _Saved)
        if saved.messages:
            conversation([asdict(message) for message in saved.messages])
    except (FieldError, PromptError) as error:
        raise SourceError(f"{path}: {error}. {_ADVICE}") from error
    return saved
