"""What a run starts from, with every open value filled in (`reasoner` does that, once), and the row that runs it.

Does not: hold anything that changes while a run goes on (`run` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwq_mlx.engine.detokenizer import Pieces
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.logits_processors import LogitsProcessor
from qwq_mlx.engine.logits_processors.bad_words import BadWords
from qwq_mlx.engine.logits_processors.dry import DryPenalty
from qwq_mlx.engine.logits_processors.language_mask import LanguageMask, LanguageTables, home_scripts
from qwq_mlx.engine.logits_processors.penalties import CountPenalty, LogitBias, RepetitionPenalty
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.engine.speculative import Drafts
from qwq_mlx.errors import GenerationError
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.plan import MemoryPlan
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking, to_json
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.trace.trace import FinishReason, Injection

__all__ = ["PrefillProgress", "Request", "new_row", "resolved"]

PrefillProgress = Callable[[int, int], None]
"""Called in prefill with the prompt ids done and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything a run starts from.

    prompt_ids: ids of the whole prompt, which ends where the assistant begins.
    question: the question, or the texts of all messages.
    system_prompt: what was put before them.
    sampling: resolved, with a seed.
    limits: with max_tokens and context filled in.
    inspect: checked against the model.
    plan: of its memory; kept wired on Metal while the run goes on.
    note: what the plan changed, for people.
    forked_at: output ids that another run drew, with another seed.
    logits_processors: the caller's own.
    check_model: called before each pass; raises DamagedModelError where the model's bytes are known to be wrong.
    drafts: guesses ids that a pass then checks; None where nothing is drafted.
    """

    model: LoadedModel
    pieces: Pieces
    profile: Profile
    prompt_ids: tuple[int, ...]
    question: str
    sampling: Sampling
    limits: Limits
    thinking: Thinking
    inspect: Inspect
    plan: MemoryPlan
    note: str = ""
    system_prompt: str | None = None
    forked_at: int = 0
    logits_processors: tuple[LogitsProcessor, ...] = ()
    check_model: Callable[[], None] | None = None
    drafts: Drafts | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the text, as JSON values; the caller's processors and a fork are only named."""
        extra: dict[str, Any] = {"logits_processors": True} if self.logits_processors else {}
        if self.forked_at:
            extra["forked_at"] = self.forked_at
        if self.system_prompt is not None:
            extra["system_prompt"] = self.system_prompt
        return {**to_json(self.sampling, self.limits, self.thinking), **extra}

    @property
    def written(self) -> str:
        """What people wrote: its scripts are at home in the output, and it says what an answer looks like."""
        return self.question if self.system_prompt is None else f"{self.system_prompt} {self.question}"

    @property
    def max_tokens(self) -> int:
        """Output ids there may be."""
        return resolved(self.limits.max_tokens)

    @property
    def context(self) -> int:
        """Positions there may be, prompt included."""
        return resolved(self.limits.context)

    def finish_after(
        self, n_output: int, *, injections: Sequence[Injection], is_stopped: bool
    ) -> tuple[FinishReason, str] | None:
        """Why a run ends after its n_output-th token, with the detail for people; None where it goes on.

        injections: answer cues so far. is_stopped: somebody asked for the end.
        """
        if is_stopped:
            return "interrupted", ""
        n_used, answer_tokens = len(self.prompt_ids) + n_output, self.thinking.answer_tokens
        if n_used >= self.context:
            return "context_full", f"{n_used:,} of {self.context:,} positions"
        if n_output >= self.max_tokens:
            return "length", f"{n_output:,} tokens"
        if injections and n_output - injections[-1].end >= answer_tokens:
            return "length", f"the answer was cut at {answer_tokens:,} tokens"
        return None

    @property
    def prompt_opens_thinking(self) -> bool:
        """Whether the template has written the tag that opens the thinking already."""
        tag = self.profile.open_tag
        tail = b"".join(self.pieces[token_id] for token_id in self.prompt_ids[-16:]).decode("utf-8", "replace")
        return tag is not None and tail.rstrip().endswith(tag)


def resolved(value: int | None) -> int:
    """A value that must be there by now. Raises GenerationError where it is not."""
    if value is None:
        raise GenerationError(
            "A limit or seed is None where the run needs its number; start runs with Reasoner.stream."
        )
    return value


def new_row(request: Request, cache: list[Any] | None) -> tuple[Row, BadWords | None]:
    """The row that a request asks for, and what stands before its tokens where texts are banned.

    cache: an earlier run's, to go on from; None for an empty one.
    """
    model = request.model
    row = Row(
        Sampler(request.sampling, seed=resolved(request.sampling.seed)),
        cache=cache or new_cache(model.module, request.plan.workload.kv_bits),
        processors=_processors(request),
        hooks=request.logits_processors,
        max_tokens=request.max_tokens,
        inspect=request.inspect,
    )
    if not request.limits.banned:
        return row, None
    bad_words = BadWords(row, request.pieces, request.limits.banned, stop_ids=model.stop_ids)
    row.processors.insert(0, bad_words)
    return row, bad_words


def _processors(request: Request) -> list[LogitsProcessor]:
    """Penalties, DRY, bias and language mask, as far as they change anything; the mask comes last."""
    sampling, pieces, n_ids = request.sampling, request.pieces, request.model.tokenizer.n_ids
    processors: list[LogitsProcessor] = []
    if sampling.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenalty(sampling.repetition_penalty, n_ids=n_ids))
    presence, frequency = sampling.presence_penalty or 0.0, sampling.frequency_penalty or 0.0
    if presence or frequency:
        processors.append(CountPenalty(presence=presence, frequency=frequency, n_ids=n_ids))
    if sampling.dry_multiplier:
        breaker_ids = pieces.holding(sampling.dry_breakers)
        processors.append(DryPenalty(sampling, n_ids=n_ids, breaker_ids=breaker_ids))
    tables = LanguageTables(pieces, home_scripts(request.written)) if request.limits.language_guard else None
    if sampling.logit_bias:
        masked = None if tables is None else tables.foreign.tolist()
        processors.append(LogitBias(sampling.logit_bias, n_ids=n_ids, masked=masked))
    if tables is not None:
        processors.append(LanguageMask(tables))
    return processors
