"""What a run starts from, with every open value filled in (`reasoner` does that, once).

Does not: hold anything that changes while a run goes on (`run` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwq_mlx.engine.detokenizer import Pieces
from qwq_mlx.errors import GenerationError
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.plan import MemoryPlan
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking, to_json
from qwq_mlx.reasoning.profile import Profile

__all__ = ["Progress", "Setup", "given"]

Progress = Callable[[int, int], None]
"""Called in prefill with the prompt ids done and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything a run starts from.

    prompt_text: the whole prompt as text. question: what people wrote in it; its scripts are at home in the output.
    sampling: resolved, with a seed. limits: with max_tokens and context filled in (`reasoner` does both).
    inspect: checked against the model. forked_at: output ids that another run drew, with another seed.
    plan: of its memory; kept wired on Metal while the run goes on. note: what the plan changed, for people.
    """

    model: LoadedModel
    pieces: Pieces
    profile: Profile
    prompt_ids: tuple[int, ...]
    prompt_text: str
    question: str
    sampling: Sampling
    limits: Limits
    thinking: Thinking
    inspect: Inspect
    plan: MemoryPlan
    note: str = ""
    forked_at: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the text, as JSON values; a hook and a fork are only named."""
        extra: dict[str, Any] = {} if self.inspect.logits_hook is None else {"logits_hook": True}
        if self.forked_at:
            extra["forked_at"] = self.forked_at
        return {**to_json(self.sampling, self.limits, self.thinking), **extra}


def given(value: int | None) -> int:
    """A value that must be there by now. Raises GenerationError where it is not."""
    if value is None:
        raise GenerationError(
            "A limit or seed is None where the run needs its number; start runs with Reasoner.stream."
        )
    return value
