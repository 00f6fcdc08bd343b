"""What a run notices in its own output while it is written: loops, and switches to another script.

Does not: act on a loop (`run` does), or find one (`reasoning.loops` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from qwq_mlx.generate.checkpoint.state import LoopEvent, SwitchEvent
from qwq_mlx.reasoning.loops import Loop, LoopDetector, LoopScores
from qwq_mlx.reasoning.scripts import ScriptWatcher
from qwq_mlx.trace.trace import Step

__all__ = ["Monitors"]


class Monitors:
    """The loop detector and the script watcher of one run.

    events: everything so far, as the Trace has it.
    question: its scripts are at home in the output.
    detects_loops: False looks for none.
    """

    def __init__(self, *, question: str, detects_loops: bool) -> None:
        self.events: list[dict[str, Any]] = []
        self._question = question
        self._detects_loops = detects_loops
        self._start()

    def _start(self) -> None:
        self._loops = LoopDetector(question=self._question) if self._detects_loops else None
        self._scripts = ScriptWatcher(self._question)

    def loop(self, token_id: int, text: str) -> Loop | None:
        """Take one token of the thinking; the loop that becomes certain with it."""
        return self._loops.feed(token_id, text) if self._loops is not None else None

    @property
    def scores(self) -> LoopScores | None:
        """How near the loop detector is to a report; None where none looks."""
        return None if self._loops is None else self._loops.scores

    def add_loop(self, loop: Loop, *, action: str) -> None:
        """Write down a loop and what was done about it."""
        self.events.append({"event": "loop", "action": action, **asdict(loop)})

    def feed(self, step: Step, *, is_final: bool = False) -> None:
        """Take the text of the next token. is_final: it is the last."""
        for switch in (self._scripts.feed(step.text), self._scripts.finish() if is_final else None):
            if switch is not None:
                self.events.append({"event": "switch", **asdict(switch), "scripts": dict(switch.scripts)})

    def rewind(self, steps: Sequence[Step]) -> None:
        """The output went back to these steps; loops stay written down, other events behind them do not."""
        self._start()
        self._replay(steps, n_seen=len(steps))
        self.events = [each for each in self.events if each["event"] == "loop" or each["end"] <= len(steps)]

    def dump(self) -> tuple[LoopEvent | SwitchEvent, ...]:
        """The events so far, as a saved run has them."""
        return tuple(LoopEvent(**each) if each["event"] == "loop" else SwitchEvent(**each) for each in self.events)

    def load(self, events: Iterable[LoopEvent | SwitchEvent], steps: Sequence[Step]) -> None:
        """Take over a saved run's events and steps.

        A switch in a line that had not ended is left out: the line goes on, and tells it at its end.
        """
        asked_at = next((step.index for step in steps if step.is_injected), len(steps))
        self._replay(steps, n_seen=asked_at)
        line = self._scripts.line_start
        self.events = [asdict(each) for each in events if each.event == "loop" or each.start < line]

    def _replay(self, steps: Sequence[Step], *, n_seen: int) -> None:
        """Take steps whose events are known. n_seen: of them those that the loop detector looked at."""
        for step in steps:
            self._scripts.feed(step.text)
            if step.index < n_seen:
                self.loop(step.id, step.text)
