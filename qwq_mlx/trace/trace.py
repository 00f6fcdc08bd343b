"""The result of a run: a `Step` per token while it goes, a frozen `Trace` of everything at the end.

A Trace is plain data (texts, numbers, tuples), so it goes to JSON and comes back equal; only hidden states, where they
were asked for, are arrays. The file says which schema it has; 2 is read, any other (1 too) is refused by name instead
of being half read.

Does not: hold a model, or work anything out that the run did not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwq_mlx.errors import SourceError
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.options import CUE_PATIENCE
from qwq_mlx.reasoning.answer import Segment
from qwq_mlx.reasoning.loops import LoopScores
from qwq_mlx.trace.timings import Timings
from qwq_mlx.trace.trace_file import read_trace, write_trace

__all__ = ["SCHEMA_VERSION", "Alternative", "Asked", "FinishReason", "Injection", "Step", "Timings", "Trace"]

SCHEMA_VERSION = 4
# Older schemas, with what they lack of the next one
_WITHOUT_ASKED, _WITHOUT_DRAFTS = 2, 3
_DRAFTS: Mapping[str, Any] = {"drafted": {}, "accepted": {}}  # of `Timings`

FinishReason = Literal["stop", "answered", "length", "budget", "loop", "context_full", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """An id that the model might have written instead.

    id: of the token.
    text: of the token alone.
    logprob: in nats, in the model's own distribution.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One token of a running generation.

    index: place in the output, from 0.
    id: the token's id.
    text: what this token completed; "" while a character or a possible stop text is unfinished.
    logprob: in nats, in the model's own distribution; None for an injected token.
    entropy: in nats, of the model's own distribution; None for an injected token.
    segment: the part that the text belongs to as far as can be told yet.
    is_injected: put there by a budget or a guard, not drawn.
    alternatives: by falling log-probability, where `Inspect.top_k` asks for them.
    margin: the first of their log-probabilities minus the second.
    loop_scores: where `Inspect.loop_scores` asks for them.
    hidden: layer -> float32 (hidden_size,), where `Inspect.hidden_layers` asks for it.

    >>> step = next(reasoner.stream("How many r in strawberry."))
    >>> step.index, step.segment, step.is_injected
    (0, 'thinking', False)
    """

    index: int
    id: int
    text: str
    logprob: float | None
    entropy: float | None
    segment: Segment
    is_injected: bool = False
    alternatives: tuple[Alternative, ...] = ()
    margin: float | None = None
    loop_scores: LoopScores | None = None
    hidden: Mapping[int, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """Ids that the run put into the output.

    start: place of the first one.
    end: place behind the last one.
    text: of all of them.
    reason: why the answer was asked for.
    """

    start: int
    end: int
    text: str
    reason: FinishReason

    def until(self, at: int, texts: Sequence[str]) -> Injection:
        """What of it stands in the first `at` steps. texts: of all steps."""
        end = min(self.end, at)
        text = "".join(texts[self.start : end])
        return Injection(start=self.start, end=end, text=text, reason=self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the model answered when it was asked behind its finished text. None of it is among the run's ids.

    cue: text that asked; it ends in the brace that opens the answer's box.
    text: what the model wrote behind it, up to the brace that closes the box.
    n_tokens: ids that were fed or drawn for it, the cue's included; the run's own count has none of them.
    answer: content of the box; None where there is none.
    confidence: product of the probabilities of the answer's ids in the model's own distribution; 0 without an answer.
    detail: why there is no answer, for people.
    """

    cue: str
    text: str
    n_tokens: int
    answer: str | None
    confidence: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All of a finished run.

    question: the question, or the texts of all messages; a system prompt beside it is in `settings`.
    prompt_ids: the ids of the whole prompt.
    ids: what came out, with the id that ended it if one did.
    text: the output without the id that ended it, and without the stop text.
    texts: what each id let out; joined they are `text`.
    thinking: the first part of the text.
    conclusion: the second part of the text.
    answer: what was extracted from the conclusion, or what the model said when asked; None where there is none.
    answer_kind: what it was told by: "heading", "box", "tag", "sentence" ..., or "asked".
    is_revised: the text doubts the answer later.
    confidence: how sure the reading is, 0 to 1; of an asked answer its probability, times 0.8 where the
      text was cut.
    thinking_span: (start, end) in ids.
    conclusion_span: (start, end) in ids; None where there is no conclusion.
    finish_reason: why the run ended, see `describe`.
    detail: more about that, for people.
    logprobs: one per id, in nats; None where injected.
    entropies: one per id, in nats; None where injected.
    injections: ids that a budget or a guard put there.
    timings: of prefill and decode.
    peak_bytes: device memory at most.
    settings: sampling, limits, thinking and seed as used.
    model: name, folder, weights, compute type.
    events: what was noticed on the way, each with "event": "loop" (see reasoning.loops.Loop, and the "action" taken) or
      "switch" (another script, see reasoning.scripts.Switch).
    alternatives: one tuple per id where `Inspect` asked, empty where injected.
    margins: one per id where `Inspect` asked.
    loop_scores: one per id where `Inspect` asked.
    hidden: layer -> (ids, hidden_size) float32 where `Inspect` asked, NaN where injected.
    asked: what the model said when it was asked (`Stream.ask_answer`); None where it was not.

    >>> trace = reasoner.generate("What is 3 + 4?", sampling=qwq_mlx.Sampling(temperature=0))
    >>> trace.answer, trace.answer_kind, trace.confidence
    ('7', 'heading', 0.98)
    >>> trace.save("sum.jsonl")
    >>> qwq_mlx.Trace.load("sum.jsonl") == trace
    True
    """

    question: str

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    texts: tuple[str, ...]
    thinking: str
    conclusion: str
    answer: str | None
    answer_kind: str
    is_revised: bool
    confidence: float
    thinking_span: tuple[int, int]
    conclusion_span: tuple[int, int] | None
    finish_reason: FinishReason
    detail: str
    logprobs: tuple[float | None, ...]
    entropies: tuple[float | None, ...]
    injections: tuple[Injection, ...]
    timings: Timings
    peak_bytes: int
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...] = field(default=())
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    margins: tuple[float | None, ...] = ()
    loop_scores: tuple[LoopScores | None, ...] = ()
    hidden: Mapping[int, Any] = field(default_factory=dict, compare=False, repr=False)
    asked: Asked | None = None

    @property
    def is_resumable(self) -> bool:
        """Whether a run that ended so can be gone on with from a checkpoint."""
        # Behind an answer cue finish_reason is the cue's; that max_tokens ended the run is then said by the detail.
        is_cut = bool(self.injections) and self.detail.endswith(f"; {len(self.ids):,} tokens")
        return is_cut or self.finish_reason in ("interrupted", "length", "context_full")

    @property
    def can_be_asked(self) -> bool:
        """Whether a run ended by itself without a sure answer, and can be asked for one from a checkpoint."""
        ended = (self.finish_reason == "stop" and not self.detail) or self.finish_reason == "loop"
        return ended and self.is_unsure and not self.injections

    @property
    def is_unsure(self) -> bool:
        """Whether there is no answer, or none that is more likely right than wrong."""
        return self.answer is None or self.confidence < _UNSURE

    @property
    def asked_tokens(self) -> int:
        """Ids that were fed or drawn to ask for the answer; `ids` has none of them."""
        return 0 if self.asked is None else self.asked.n_tokens

    def describe(self, *, is_saved: bool = False) -> str:
        """Why the run ended, the answer and how sure it is, and how to continue where that makes sense.

        is_saved: it can be resumed already, so how to continue is left out.

        >>> trace.describe()
        "the model ended its text; answer '3', confidence 0.98"
        """
        why = _DESCRIPTIONS[self.finish_reason] + (f" ({self.detail})" if self.detail else "")
        if self.answer is None:
            answer = "no answer is marked in the text" if self.finish_reason == "stop" else "no answer"
        else:
            shown = self.answer if len(self.answer) <= _SHOWN else self.answer[: _SHOWN - 1] + "…"
            doubted = ", doubted afterwards" if self.is_revised else ""
            unsure = "unsure " if self.is_unsure else ""
            was_asked = "asked for behind the text, " if self.answer_kind == "asked" else ""
            answer = f"{unsure}answer {shown!r}{doubted}, {was_asked}confidence {self.confidence:.2f}"
        return "; ".join(part for part in (why, answer, None if is_saved else self._way_on()) if part)

    def _way_on(self) -> str | None:
        """How to continue. Without a saved file, a text that the model ended without an answer is drawn again up to
        shortly before its end, and the answer asked for there."""
        if self.asked is not None and self.finish_reason == "stop":
            return f"asked behind the text: {self.asked.detail}" if self.asked.detail else None
        can_ask = self.is_unsure and not self.injections
        if self.finish_reason == "stop" and self.is_unsure:
            n_tokens, sampling = max(0, len(self.ids) - 1 - CUE_PATIENCE), self.settings["sampling"]
            has_seed = sampling.get("seed") is not None and sampling.get("temperature") != 0  # greedy runs draw nothing
            same = f" `seed` {sampling['seed']}" if has_seed else ""
            saved = "`save` the run and `resume` it with `answer_now`, or " if self.can_be_asked else ""
            return f"for one, {saved}repeat it with{same} `think_tokens` {n_tokens}"
        if self.finish_reason == "answered" and self.is_unsure:
            return "to try again, another `seed`"
        if can_ask and self.finish_reason in ("loop", "context_full"):
            return f"{_WAYS_ON[self.finish_reason]}; for an answer, `save` the run and `resume` it with `answer_now`"
        return _WAYS_ON.get(self.finish_reason)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, the schema's version first; all but the hidden states."""
        values = dataclasses.asdict(dataclasses.replace(self, hidden={}))
        del values["hidden"]
        return {"schema_version": SCHEMA_VERSION, **values}

    def save(self, path: str | Path) -> None:
        """Write JSON lines, hidden states beside them (`trace_file`); the file appears whole or not at all.

        Raises SavingError where the disk does not take it.
        """
        fields = self.to_json()
        del fields["schema_version"], fields["text"]
        columns = {one: fields.pop(many) for one, many in _COLUMNS.items()}
        shown = {name: values for name, values in columns.items() if values or name in _ALWAYS}
        tokens = [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)]
        write_trace(Path(path), fields, tokens, self.hidden, schema=SCHEMA_VERSION)

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> Trace:
        """The Trace again. Raises SourceError for another schema, and fields missing, unknown or of a wrong kind."""
        if isinstance(value, dict):
            value = _as_now(value)
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            version = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
            raise SourceError(
                f"{where}: schema_version is {version!r}, expected {SCHEMA_VERSION}. "
                "Read the trace with the version of qwq_mlx that wrote it."
            )
        fields = {name: field for name, field in value.items() if name != "schema_version"}
        try:
            trace = from_json_value(fields, cls, without={"hidden"})
        except FieldError as error:
            raise SourceError(f"{where}: {error}. The file is damaged or edited; save the trace again.") from error
        if "".join(trace.texts) != trace.text or not len(trace.texts) == len(trace.ids) == len(trace.logprobs):
            raise SourceError(
                f"{where}: text, texts, ids and logprobs do not fit together. The file is damaged or edited; save the "
                "trace again."
            )
        return trace

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote, every byte checked. Raises SourceError naming the file and the fault."""
        fields, tokens, hidden = read_trace(Path(path), schemas=(_WITHOUT_ASKED, _WITHOUT_DRAFTS, SCHEMA_VERSION))
        names = tokens[0].keys() if tokens else _ALWAYS
        for place, token in enumerate(tokens, start=2):
            if token.keys() != names or not _ALWAYS <= names <= _COLUMNS.keys():
                raise SourceError(f"{path}: line {place:,} has the fields {', '.join(token)}. The file is edited.")
        columns = {many: [token[one] for token in tokens if one in token] for one, many in _COLUMNS.items()}
        text = "".join(map(str, columns["texts"]))
        trace = cls.from_json({**fields, **columns, "text": text}, where=str(path))
        return dataclasses.replace(trace, hidden=hidden)


def _as_now(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a trace of an older schema, with what it lacks; others as they are."""
    if value.get("schema_version") == _WITHOUT_ASKED and "asked" not in value:
        value = {**value, "schema_version": _WITHOUT_DRAFTS, "asked": None}
    timings = value.get("timings")
    if value.get("schema_version") == _WITHOUT_DRAFTS and isinstance(timings, dict) and not _DRAFTS.keys() & timings:
        value = {**value, "schema_version": SCHEMA_VERSION, "timings": {**timings, **_DRAFTS}}
    return value


# One a token: name in its line, and the Trace's field; the first four are always there.
_COLUMNS = {
    "id": "ids",
    "text": "texts",
    "logprob": "logprobs",
    "entropy": "entropies",
    "margin": "margins",
    "loop_scores": "loop_scores",
    "alternatives": "alternatives",
}
_ALWAYS = frozenset(("id", "text", "logprob", "entropy"))

_DESCRIPTIONS: dict[str, str] = {
    "stop": "the model ended its text",
    "answered": "the answer was asked for during the run",
    "length": "`max_tokens` was reached",
    "budget": "the thinking budget was spent and the answer asked for",
    "loop": "the text went round in a loop",
    "context_full": "the context is full",
    "interrupted": "interrupted",
}
_WAYS_ON: dict[str, str] = {
    "length": "to go on, `save` the run and `resume` it with more `max_tokens`",
    "budget": "for a longer thinking, more `think_tokens`",
    "loop": "to get past it, `on_loop` nudge or another `seed`",
    "context_full": "to go on, ask again with a shorter prompt",
    "interrupted": "to go on, `save` the run and `resume` it",
}
_UNSURE = 0.5
_SHOWN = 60  # characters of an answer in `describe`
