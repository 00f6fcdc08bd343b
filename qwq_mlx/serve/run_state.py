"""A watched run as JSON, so that it can go on later: what it was asked, how far it is, and the lines of its steps.

Together they are a saved run without its KV cache, which is worked out again from the ids.

Does not: store anything (`history` does), or run it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwq_mlx.errors import SourceError

if TYPE_CHECKING:
    from qwq_mlx.generate.checkpoint.state import RunState
    from qwq_mlx.generate.request import Request
    from qwq_mlx.generate.run import Run

__all__ = ["SavedRun", "progress_json", "read_run_state", "request_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What is known of a run that is over for now, and how it is to go on.

    id: of the run, for messages.
    model: which one wrote it (`ModelCard.identity`).
    request: what it starts from; None where only its file knows.
    progress: how far it is.
    lines: of its steps.
    path: of the file that `save` wrote; None where there is none.
    fork_at: steps that another run takes over, which goes on with `seed`; None goes on with all of them and the run's.
    seed: of that other run.
    max_tokens, context, answer_now: as `Reasoner.resume` takes them.
    """

    id: str
    model: str = ""
    request: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    lines: Sequence[bytes] = ()
    path: Path | None = None
    fork_at: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    context: int | None = None
    answer_now: bool = False


def request_json(request: Request) -> dict[str, Any]:
    """What a run starts from; it does not change."""
    return {
        "question": request.question,
        "prompt_ids": list(request.prompt_ids),
        "settings": request.settings,
        "inspect": asdict(request.inspect),
        "compute_type": request.model.compute_type,
    }


def progress_json(run: Run) -> dict[str, Any]:
    """How far a run is, without its steps. Call it between two steps of the engine."""
    state = run.dump()
    return {
        "n_steps": len(state.steps),
        "injections": [asdict(each) for each in state.injections],
        "events": [asdict(each) for each in state.events],
        "asking": state.asking,
        "nudges": state.nudges,
        "finish_reason": state.finish_reason,
        "is_due": state.is_due,
    }


_NOT_BEGUN: dict[str, Any] = {
    "n_steps": 0,
    "injections": [],
    "events": [],
    "asking": None,
    "nudges": [0, 0],
    "finish_reason": None,
    "is_due": False,
}


def read_run_state(
    request: Mapping[str, Any], progress: Mapping[str, Any] | None, lines: Sequence[bytes], *, where: str
) -> RunState:
    """The state of a run from what `request_json`, `progress_json` and `choice.step_json` wrote.

    progress: None where the run had not begun. lines: of its steps, at least as many as the progress has.
    Raises SourceError naming `where` and the field that is wrong.
    """
    try:
        value = _state_json(request, progress or _NOT_BEGUN, lines)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: what is known of the run is damaged ({error!r}). Delete it.") from error
    from qwq_mlx.generate.checkpoint.state import read_state  # with MLX, which is loaded by now

    return read_state(json.loads(json.dumps(value)), path=Path(where))


def _state_json(request: Mapping[str, Any], progress: Mapping[str, Any], lines: Sequence[bytes]) -> dict[str, Any]:
    from qwq_mlx.reasoning.loops import LoopScores

    steps = [json.loads(line) for line in lines[: progress["n_steps"]]]
    rows = [
        (
            step["margin"],
            [(each["id"], each["text"], each["logprob"]) for each in step["alternatives"]],
            None if step["loop_scores"] is None else [step["loop_scores"][each.name] for each in fields(LoopScores)],
        )
        for step in steps
    ]
    return {
        **{name: each for name, each in progress.items() if name != "n_steps"},
        **{name: request[name] for name in ("question", "prompt_ids", "settings", "compute_type")},
        "model_sha256": "",
        "steps": [(step["id"], step["logprob"], step["entropy"], step["is_injected"]) for step in steps],
        "capacities": [],
        "n_shown": 0,
        "seen": {"asked": request["inspect"], "rows": rows},
    }
