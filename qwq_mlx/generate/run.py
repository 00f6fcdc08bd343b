"""One generation as a state machine that is fed: tokens become `Step`s, and `schedule` says what the engine does next.

    while not run.is_finished:
        instruction = run.schedule()      # go on, inject ids, or go back
        token = ...                       # the engine's forward pass
        run.accept(token)

Every token goes through the same stations in the same order: text, stop texts, limits, loop detector, split. What ends
the run is known before its last Step is handed out, so that Step carries the text held back until then and the joined
texts of all Steps are the Trace's text.

Where the thinking has to end (its budget is spent, it goes round in a loop, or `answer_now` was called), the run waits
for a good place (`budget_forcing`) and then puts the profile's answer cue into the output.

Does not: know MLX, a cache or a clock (`stream` drives it), or make prompts (`reasoner` does).
"""

from __future__ import annotations

from typing import NamedTuple

from qwq_mlx.engine.row import Token
from qwq_mlx.generate.budget_forcing import BudgetForcing, cue_ids
from qwq_mlx.generate.checkpoint.state import RunState
from qwq_mlx.generate.loop_recovery import LoopRecovery
from qwq_mlx.generate.monitors import Monitors
from qwq_mlx.generate.output import Output
from qwq_mlx.generate.request import Request
from qwq_mlx.options import Sampling
from qwq_mlx.reasoning.loops import Loop
from qwq_mlx.trace.trace import FinishReason, Injection, Step

__all__ = ["Inject", "Rewind", "Run"]


class Inject(NamedTuple):
    """Append these ids, which were not drawn."""

    ids: tuple[int, ...]


class Rewind(NamedTuple):
    """Go back to the first n_output ids of the output."""

    n_output: int


class Run:
    """The state of one run. `take` hands its Steps out, `schedule` and `accept` are the engine's.

    finish: why it ended, with the detail for people; None while it goes on.
    is_stopped: set it, also in a signal handler, to end the run after the token under way ("interrupted").
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finish: tuple[FinishReason, str] | None = None
        self.injections: list[Injection] = []
        self.output = Output(request)
        self.monitors = Monitors(question=request.written, detects_loops=request.thinking.on_loop != "off")
        self.budget = BudgetForcing(request.thinking)
        self.recovery = LoopRecovery(request.sampling)
        self._loop: Loop | None = None  # what to go back for
        self._is_due = False  # what follows from the last step is still to be done
        self.is_stopped = False
        self._n_shown = 0  # steps handed out; an answer cue is written before its first one is

    @property
    def steps(self) -> list[Step]:
        """All Steps so far."""
        return self.output.steps

    @property
    def has_untaken(self) -> bool:
        """Whether there are Steps that were not handed out yet."""
        return self._n_shown < len(self.steps)

    @property
    def sampling(self) -> tuple[Sampling, int]:
        """How the next token is drawn, and the salt of its random numbers."""
        return self.recovery.sampling

    def take(self) -> Step | None:
        """The next Step that was not handed out yet; None where there is none."""
        if not self.has_untaken:
            return None
        self._n_shown += 1
        return self.steps[self._n_shown - 1]

    def schedule(self) -> Inject | Rewind | None:
        """What the engine does before the next forward: follows from the last Step, once. None is to go on."""
        if self.finish is not None:
            return None
        if self._loop is not None:
            return self.go_back()
        reason, self.budget.due_at_once = self.budget.due_at_once, None
        if self._is_due:
            self._is_due = False
            self.recovery.feed(self.steps[-1])
            reason = self.budget.feed(self.steps[-1], self.output.segment)
        return None if reason is None else self._inject(reason)

    def go_back(self) -> Rewind | None:
        """Where a loop makes it due, go back to its beginning; None where nothing is."""
        loop = self._loop
        if loop is None or self.finish is not None:
            return None
        self._loop, self._is_due = None, False
        self.recovery.nudge()
        steps = self.steps[: loop.start]
        for part in (self.output, self.budget, self.monitors):
            part.rewind(steps)
        self._n_shown = min(self._n_shown, len(steps))
        return Rewind(len(steps))

    def _inject(self, reason: FinishReason) -> Inject | None:
        """Put the answer cue into the output, if there is room for it and for some answer."""
        request, start = self.request, len(self.steps)
        after = self.output.text[-2:] if start else "\n\n"
        ids = cue_ids(request.model.tokenizer, request.profile, after=after)
        if start + len(ids) >= request.max_tokens:
            return None
        steps = self.output.inject(ids)
        for step in steps:
            self.monitors.feed(step)
        self.finish = self.output.finish
        text = "".join(step.text for step in steps)
        self.injections.append(Injection(start=start, end=start + len(steps), text=text, reason=reason))
        return Inject(tuple(step.id for step in steps))

    def accept(self, token: Token) -> None:
        """Take the next token through all stations, which makes it a Step."""
        text = ""
        if token.id in self.request.model.stop_ids:
            self.finish = ("stop", "")
        else:
            text = self.output.release(token.id)
            self.finish = self.output.finish or self.request.finish_after(
                len(self.steps) + 1, injections=self.injections, is_stopped=self.is_stopped
            )
            self._look_for_loops(token.id, text)
        if self.finish is not None:
            text += self.output.flush()
            self.finish = self.output.finish or self.finish
        scores = self.monitors.scores if self.request.inspect.loop_scores else None
        step = self.output.feed(token, text, loop_scores=scores)
        self.monitors.feed(step, is_final=self.finish is not None)
        self._is_due = True

    def _look_for_loops(self, token_id: int, text: str) -> None:
        """Feed the detector until the answer was asked for, and do what the options say when it reports."""
        loop = self.monitors.loop(token_id, text) if not self.injections else None
        if loop is None or self.finish is not None:
            return
        action = self.request.thinking.on_loop
        if action == "nudge" and self.recovery.is_spent:
            action = "answer"
        if action == "answer" and self.output.segment == "answer":
            action = "stop"  # there is nothing left to ask for
        self.monitors.add_loop(loop, action=action)
        if action == "stop":
            self.finish = ("loop", loop.evidence)
        elif action == "nudge":
            self._loop = loop
        else:
            self.budget.ask("loop")

    def dump(self) -> RunState:
        """Everything that the next token depends on, but for the cache and what `Inspect` showed."""
        return RunState(
            compute_type=self.request.model.compute_type,
            settings=self.request.settings,
            prompt_ids=self.request.prompt_ids,
            question=self.request.question,
            steps=self.output.dump(),
            injections=tuple(self.injections),
            events=self.monitors.dump(),
            asking=self.budget.dump(),
            nudges=self.recovery.dump(),
            finish_reason=None if self.finish is None else self.finish[0],
            n_shown=min(self._n_shown, len(self.steps)),
            is_due=self._is_due,
        )

    def load(self, state: RunState) -> None:
        """Take over the state of another run of the same request, before the first token."""
        self.output.load(state.steps)
        self.injections = list(state.injections)
        self.monitors.load(state.events, self.steps)
        self.recovery.load(state.nudges)
        self._n_shown = min(state.n_shown, len(self.steps))
        self._is_due = state.is_due
        self.budget.rewind(self.steps[:-1] if self._is_due else self.steps)  # `schedule` feeds the last one
        self.budget.load(state.asking, is_over=bool(self.injections))
