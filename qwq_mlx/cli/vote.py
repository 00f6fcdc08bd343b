"""`generate --samples N`: the answer that most samples agree on, a line on stderr for each that ended.

Does not: save, resume or write receipts of samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwq_mlx.cli.command import Command, end_verification, load_reasoner, note_drafts
from qwq_mlx.cli.generate_flags import RunOptions
from qwq_mlx.default_model import choose_model

if TYPE_CHECKING:
    from qwq_mlx.generate.vote import Vote, VoteGroup
    from qwq_mlx.trace.trace import Trace

__all__ = ["answer_by_vote"]


def answer_by_vote(command: Command, prompt: str, asked: RunOptions) -> int:
    """Vote on the question, print the answer and how many agree; returns the exit code, 1 where there is no answer."""
    from qwq_mlx.model.prompt import conversation

    options, interruption = command.options, command.interruption
    conversation(prompt, system_prompt=options.system_prompt)  # wrong text is told before a model is loaded
    reasoner = load_reasoner(
        command,
        asked.limits,
        choice=choose_model(options.model),
        reproducible=options.reproducible,
    )
    from qwq_mlx.cli.terminal import settings_line
    from qwq_mlx.generate.vote import Voting

    run = reasoner.stream(
        prompt,
        system_prompt=options.system_prompt,
        sampling=asked.sampling,
        limits=asked.limits,
        thinking=asked.thinking,
    )
    voting = Voting(
        run,
        options.samples,
        width=options.width,
        stop_early=not options.all_samples,
        confidence=options.confidence,
        limit_bytes=reasoner.limit_bytes,
    )
    interruption.run = voting
    if run.request.note:
        command.warn(run.request.note)
    command.note(f"{settings_line(run)}, {options.samples:,} samples")

    def progress(place: int, trace: Trace, groups: Sequence[VoteGroup]) -> None:
        command.note(f"sample {place}: {_outcome(trace)}; {_standing(groups)}")

    try:
        vote = voting.work(progress)
    finally:
        interruption.run = None
    if options.json:
        sys.stdout.write(json.dumps(vote.to_json(), ensure_ascii=False) + "\n")
    elif vote.answer is not None:
        sys.stdout.write(f"{_one_line(vote.answer)}\n{len(vote.groups[0].samples)} of {_n_ended(vote)} samples agree\n")
    sys.stdout.flush()
    for place, reason in vote.failures.items():
        command.warn(f"sample {place} failed: {reason}")
    command.note(_summary(vote))
    note_drafts(command, reasoner)
    end_verification(command, reasoner)
    if vote.stopped == "interrupted":
        command.warn("interrupted: the samples under way are not counted")
        return interruption.exit_code
    return 0 if vote.answer is not None else command.fail("no sample has an answer", 1)


def _n_ended(vote: Vote) -> int:
    return sum(trace.finish_reason != "interrupted" for trace in vote.traces) + len(vote.failures)


def _outcome(trace: Trace) -> str:
    answer = "no answer" if trace.answer is None else _one_line(trace.answer)
    return f"{answer} ({trace.finish_reason}, {len(trace.ids):,} tokens)"


def _standing(groups: Sequence[VoteGroup]) -> str:
    return ", ".join(f"{len(group.samples)} x {_one_line(group.answer)}" for group in groups[:4]) or "no votes"


def _one_line(text: str) -> str:
    """An answer as a terminal can show it: a model can write control characters."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= 200 else f"{shown[:199]}…"


def _summary(vote: Vote) -> str:
    why = {
        "": "all samples ended",
        "lead": "the lead cannot be overtaken",
        "confidence": "the posterior is reached",
        "interrupted": "interrupted",
    }[vote.stopped]
    saved = f", about {vote.n_tokens_saved:,} saved" if vote.n_tokens_saved else ""
    return f"{why}: agreement {vote.agreement:.0%}, {vote.n_tokens:,} tokens{saved}"
