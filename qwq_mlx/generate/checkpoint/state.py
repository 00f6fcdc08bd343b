"""What a run on disk knows besides its cache: one frozen value, written and read as JSON, every field checked.

A digest proves that a file is as it was written, not by whom: who edits it can work out another. So nothing is taken on
trust that would end the process (an id beyond the model), fail later without a name, or contradict itself.

Does not: know whether the ids were really drawn by this model, or check arrays (`resume` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from qwq_mlx.errors import SourceError
from qwq_mlx.files.json_dataclass import FieldError, from_json_value, shown
from qwq_mlx.generate.loop_recovery import MAX_NUDGES, STRETCH
from qwq_mlx.options import Inspect, from_json
from qwq_mlx.trace.trace import FinishReason, Injection

__all__ = ["InspectedSteps", "LoopEvent", "RunState", "SwitchEvent", "read_state", "state_json"]

_ADVICE = "The file is edited; it cannot be resumed."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopEvent:
    """A loop and what was done about it, as `Monitors` writes it down."""

    event: Literal["loop"]
    action: Literal["answer", "stop", "nudge", "off"]
    kind: Literal["cycle", "variants", "candidate", "doubts"]
    start: int
    end: int
    period: int | None
    score: float
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchEvent:
    """A switch to another script, as `Monitors` writes it down."""

    event: Literal["switch"]
    start: int
    end: int
    at: int
    scripts: Mapping[str, int]
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedSteps:
    """asked: what was to be shown. rows: for each step its margin, its alternatives (id, text, log-probability) and its
    loop scores; hidden states are arrays of the file."""

    asked: Inspect
    rows: tuple[
        tuple[float | None, tuple[tuple[int, str, float], ...], tuple[float, float, float, float] | None],
        ...,
    ]

    def __post_init__(self) -> None:
        for margin, alternatives, scores in self.rows:
            # an alternative that a processor forbids may have no probability
            is_sound = not any(math.isnan(value) for _, _, value in alternatives) and not math.isnan(margin or 0.0)
            if not is_sound or any(not math.isfinite(value) for value in scores or ()):
                raise FieldError("seen", "not a number", "numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A saved run. Raises FieldError where its fields contradict each other.

    model_sha256: digest of the model's folder.
    compute_type: what it was computed in.
    settings: sampling, limits, thinking as JSON values; "logits_processors", "forked_at"
      and "system_prompt" where the run had them.
    prompt_ids, question: of the request.
    steps: id, log-probability, entropy and is_injected of each.
    injections: answer cues.
    events: loops and switches of the script.
    asking: why and after how many drawn tokens the answer was asked for, where the cue is still to come.
    nudges: how many there were, and tokens left of the stretch under way.
    capacities: positions that each layer's cache had room for; none without a cache.
    finish_reason: None while the run goes on.
    seen: what `Inspect` showed, None where nothing was asked for.
    n_shown: steps that were handed out.
    is_due: what follows from the last step is still to be done.
    """

    model_sha256: str = ""
    compute_type: str
    settings: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    question: str
    steps: tuple[tuple[int, float | None, float | None, bool], ...]
    injections: tuple[Injection, ...]
    events: tuple[LoopEvent | SwitchEvent, ...]
    asking: tuple[FinishReason, int] | None
    nudges: tuple[int, int]
    capacities: tuple[int, ...] = ()
    finish_reason: FinishReason | None
    seen: InspectedSteps | None = None
    n_shown: int
    is_due: bool

    def __post_init__(self) -> None:
        n_steps = len(self.steps)
        if not self.prompt_ids:
            raise FieldError("prompt_ids", "empty", "the ids of a prompt")
        injected = {place for place, step in enumerate(self.steps) if step[3]}
        named = {place for each in self.injections for place in range(each.start, min(each.end, n_steps))}
        if injected != named or any(not 0 <= each.start < each.end <= n_steps for each in self.injections):
            raise FieldError("injections", shown(self.injections), f"the {len(injected)} injected tokens of {n_steps}")
        for place, (_, logprob, entropy, is_injected) in enumerate(self.steps):
            if (logprob is None) != is_injected or not all(map(math.isfinite, (logprob or 0.0, entropy or 0.0))):
                raise FieldError(
                    f"steps[{place}]", shown((logprob, entropy)), "a log-probability for every token that was drawn"
                )
        if any(event.start < 0 or event.end < 0 for event in self.events):
            raise FieldError("events", shown(self.events), "places in the output")
        if not 0 <= self.n_shown <= n_steps:
            raise FieldError("n_shown", str(self.n_shown), f"0 to {n_steps}, the tokens there are")
        if self.is_due and (not self.steps or self.steps[-1][3]):
            raise FieldError("is_due", "true", "false where no token was drawn last")
        if self.asking is not None and self.asking[1] < 0:
            raise FieldError("asking", shown(self.asking), "a number of tokens from 0")
        if not 0 <= self.nudges[0] <= MAX_NUDGES or not 0 <= self.nudges[1] <= STRETCH:
            expected = f"at most {MAX_NUDGES} nudges, and at most {STRETCH} tokens left of one"
            raise FieldError("nudges", shown(self.nudges), expected)
        if self.seen is not None and len(self.seen.rows) != n_steps:
            raise FieldError("seen", f"of {len(self.seen.rows)} tokens", f"{n_steps}, the tokens there are")

    def until(self, at: int, *, texts: Sequence[str]) -> RunState:
        """The state after the first `at` steps, as a run that goes on from there has it. texts: of all steps.

        Nudges and a cue that was only asked for belong to the run that was left, and so does what was seen.
        """
        return replace(
            self,
            steps=self.steps[:at],
            injections=tuple(each.until(at, texts) for each in self.injections if each.start < at),
            events=tuple(each for each in self.events if each.end <= at),
            asking=None,
            nudges=(0, 0),
            finish_reason=None,
            seen=None,
            n_shown=at,
            is_due=at > 0 and not self.steps[at - 1][3],
        )

    def without_end(self, n_steps: int) -> RunState:
        """The state with the first n_steps alone, to ask for the answer behind them.

        A loop that a nudge took back may lie behind the end, and stays written down.
        """
        seen = None if self.seen is None else replace(self.seen, rows=self.seen.rows[:n_steps])
        events = (
            each
            for each in self.events
            if each.end <= n_steps or (isinstance(each, LoopEvent) and each.action == "nudge")
        )
        return replace(
            self,
            steps=self.steps[:n_steps],
            events=tuple(events),
            seen=seen,
            n_shown=min(self.n_shown, n_steps),
            is_due=False,
        )


def state_json(state: RunState) -> dict[str, Any]:
    """The state as JSON values."""
    return {**asdict(state), "seen": {} if state.seen is None else asdict(state.seen)}


def read_state(value: Any, *, path: Path) -> RunState:
    """What `state_json` gave. Raises SourceError naming file, field, what was found and what was expected."""
    try:
        if isinstance(value, dict) and value.get("seen") == {}:
            value = {**value, "seen": None}
        state = from_json_value(value, RunState)
        _check_settings(state.settings, path)
    except FieldError as error:
        raise SourceError(f"{path}: {error}. {_ADVICE}") from error
    return state


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Options that can be made again, with nothing left open."""
    extra = {"logits_processors", "forked_at", "system_prompt"}
    if settings.keys() - extra != {"sampling", "limits", "thinking"}:
        raise FieldError("settings", shown(sorted(settings)), "sampling, limits and thinking")
    forked_at = settings.get("forked_at", 0)
    if settings.get("logits_processors", True) is not True or type(forked_at) is not int or forked_at < 0:
        shown_ones = {name: settings.get(name) for name in ("logits_processors", "forked_at")}
        raise FieldError("settings", shown(shown_ones), "true, and a number of ids")
    if not isinstance(settings.get("system_prompt", ""), str):
        raise FieldError("settings.system_prompt", shown(settings["system_prompt"]), "a text")
    sampling, limits, _ = from_json(settings, where=str(path))
    for options, may_be_open in ((sampling, ()), (limits, ("kv_bits",))):
        for name in (each.name for each in fields(options) if each.name not in may_be_open):
            if getattr(options, name) is None:
                raise FieldError(f"settings.{name}", "null", "the value that the run had")
    if limits.kv_bits == "auto":
        raise FieldError("settings.kv_bits", "'auto'", "8, 4 or null")
