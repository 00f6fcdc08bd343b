"""What a run notices in its own output while it writes it: loops, and switches to another script.

Does not: act on a loop (`run` does), or find one (`reasoning.loops` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from qwq_mlx.reasoning.loops.detector import Loop, LoopDetector, LoopScores
from qwq_mlx.reasoning.scripts import ScriptWatcher
from qwq_mlx.trace.trace import Step

__all__ = ["Noticed"]


class Noticed:
    """events: everything so far, as the Trace has it. question: its scripts are at home in the output.

    detects_loops: False looks for none.
    """

    def __init__(self, *, question: str, detects_loops: bool) -> None:
        self.events: list[dict[str, Any]] = []
        self._question = question
        self._detects_loops = detects_loops
        self._start()

    def _start(self) -> None:
        self._loops = LoopDetector() if self._detects_loops else None
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

    def scripts(self, text: str, *, is_final: bool) -> None:
        """Take the text of the next token; is_final: it is the last."""
        for switch in (self._scripts.feed(text), self._scripts.finish() if is_final else None):
            if switch is not None:
                self.events.append({"event": "switch", **asdict(switch), "scripts": dict(switch.scripts)})

    def replay(self, step: Step, *, sees_loops: bool) -> None:
        """Take again a token whose events are known already."""
        self._scripts.feed(step.text)
        if sees_loops:
            self.loop(step.id, step.text)

    def rewind(self, steps: Sequence[Step], *, start: int) -> None:
        """The output went back to these steps; loops stay written down, other events from token `start` on do not."""
        self._start()
        for step in steps:
            self.replay(step, sees_loops=True)
        self.events = [each for each in self.events if each["event"] == "loop" or each["end"] <= start]

    def until(self, end: int) -> list[dict[str, Any]]:
        """The events that were over after `end` tokens."""
        return [each for each in self.events if each["end"] <= end]

    def restore(self, events: Iterable[dict[str, Any]]) -> None:
        """Take over a saved run's events, behind the `replay` of its tokens. A switch in a line that had not ended is
        left out: the line goes on, and tells it at its end."""
        line = self._scripts.line_start
        self.events = [each for each in events if each["event"] == "loop" or each["start"] < line]
