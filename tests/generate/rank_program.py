"""What several processes that hold a model together are tried with, and one process beside them.

    python -m rank_program MODEL FOLDER RESULT few|all

Run by `Launch` as rank 0. FOLDER has saved.qwq, of a run that one process had begun, and draft, a draft model; N.qwq is
written there by N. With four processes on two cores MLX's ring takes some 50 ms a sum, so they do few things.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qwq_mlx import Limits, Reasoner, Sampling, Thinking, load
from qwq_mlx.cli.rank import joined_group

QUESTION = "What is 3 + 4?"
_DRAWN = Sampling(temperature=0.8, seed=3)
_SHORT = Limits(max_tokens=10)


def loaded(model: Path, group: Any | None = None, draft: str | Path = "ngram") -> Reasoner:
    """With drafts of fixed length, so that passes over several ids are among them."""
    return load(model, group=group, verify=False, draft=draft, draft_length=2)


def begin(reasoner: Reasoner, path: Path) -> None:
    """Save a run after six tokens."""
    run = reasoner.stream(QUESTION, sampling=_DRAWN, limits=_SHORT)
    for _ in range(5):
        next(run)
    run.save(path)


def go_on(reasoner: Reasoner, path: Path) -> list[int]:
    """The rest of a saved run."""
    return [step.id for step in reasoner.resume(path)]


def work(reasoner: Reasoner) -> dict[str, Any]:
    """Ids of runs of every kind."""
    run = reasoner.stream(QUESTION, sampling=_DRAWN, limits=_SHORT)
    ids = [step.id for step in run]
    fork = run.fork(at=5, seed=9)
    asked = reasoner.stream(QUESTION, sampling=_DRAWN, limits=Limits(max_tokens=24))
    for step in asked:
        if step.index == 3:
            asked.answer_now()
        if step.index == 20:
            asked.stop()
    together = reasoner.batch_generate(
        [QUESTION, "What is 2 + 9?", "And 5?"], sampling=_DRAWN, limits=_SHORT, ask_answer=True
    )
    cut = reasoner.generate(
        QUESTION, sampling=_DRAWN, limits=Limits(max_tokens=20, kv_bits=8), thinking=Thinking(think_tokens=4)
    )
    vote = reasoner.vote(QUESTION, n=3, sampling=_DRAWN, limits=_SHORT)
    return {
        "run": ids,
        "fork": [step.id for step in fork],
        "asked": [asked.trace().ids, [each.text for each in asked.trace().injections]],
        "batch": [trace.ids for trace in together],
        "asked behind": [trace.asked is not None for trace in together],
        "budget, 8 bits": cut.ids,
        "vote": [trace.ids for trace in vote.traces],
    }


def batch(reasoner: Reasoner) -> list[list[int]]:
    """Ids of two rows that share passes, over several ids of each where something is drafted."""
    traces = reasoner.batch_generate([QUESTION, "What is 2 + 9?"], sampling=_DRAWN, limits=_SHORT)
    return [trace.ids for trace in traces]


def main() -> int:
    """Rank 0."""
    model, folder, result = map(Path, sys.argv[1:4])
    group = joined_group()
    assert group is not None, "Launch starts it"
    reasoner = loaded(model, group)
    begin(reasoner, folder / f"{group.size()}.qwq")
    found = work(reasoner) if sys.argv[4] == "all" else {}
    found["resumed"] = go_on(reasoner, folder / "saved.qwq")
    del reasoner
    reasoner = loaded(model, group, folder / "draft")  # which rank 0 alone has
    found["draft model"] = batch(reasoner)
    assert reasoner.generate(QUESTION, limits=_SHORT).timings.drafted.get("model"), "nothing was drafted"
    result.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
