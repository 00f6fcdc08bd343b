"""Several samples of one question, and the answer that most of them agree on (self-consistency).

The prompt is prefilled once. Its KV cache is in memory once, too, and each sample holds what it writes itself
(`model.shared_prefix`; prompts below 256 positions are copied). The samples share each pass over the weights
(`scheduler`). Sample i is drawn with seed `question_seed(seed, i)`, so its ids are those of one run with that seed.

Sources: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (arXiv
2203.11171); the posterior is the Beta criterion of Aggarwal et al. 2023, "Let's Sample Step by Step:
Adaptive-Consistency for Efficient Reasoning and Coding with LLMs" (arXiv 2305.11860).

Does not: weigh votes by confidence, or judge answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwq_mlx.errors import BatchError, OptionError, error_text
from qwq_mlx.generate.batch import kv_bytes_here, plan_rows, question_seed
from qwq_mlx.generate.request import resolved
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions
from qwq_mlx.model.shared_prefix import MIN_SHARED
from qwq_mlx.options import MAX_SAMPLES
from qwq_mlx.reasoning.answer import compare, normalise
from qwq_mlx.trace.trace import Trace

__all__ = [
    "MAX_SAMPLES",
    "Vote",
    "VoteGroup",
    "VoteProgress",
    "Voting",
    "check_vote",
    "count_votes",
    "decided",
    "posterior",
]

Decision = Literal["", "lead", "confidence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteGroup:
    """Samples whose answers say the same.

    answer: the spelling that most of them have.
    samples: their places, ascending.
    """

    answer: str
    samples: tuple[int, ...]


VoteProgress = Callable[[int, Trace, Sequence[VoteGroup]], None]
"""Called after each sample that ended, with its place, its trace and the groups so far, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What several samples of one question say.

    n: samples asked for.
    answer: of the largest group; of equally large ones, of the one with the earliest sample. None where none has any.
    agreement: share of the samples that ended which are in that group, from 0 to 1.
    posterior: probability that its answer is more frequent than the second, in samples without number (`posterior`).
    stopped: why the rest was not drawn: "lead", "confidence", "interrupted"; "" where every sample ended.
    groups: the largest first.
    traces: of the samples that began, in their order; those cut short have the finish_reason "interrupted".
    failures: why samples could not go on, by place.
    n_tokens: output tokens of all samples behind what they share, those to ask for an answer included.
    n_tokens_saved: estimate of the tokens not drawn: the mean length of a sample that ended, for each that did not,
      less what was drawn of it.

    >>> vote = reasoner.vote("What is 3 + 4?", n=3, width=2, sampling=qwq_mlx.Sampling(seed=1))
    >>> vote.answer, [group.samples for group in vote.groups]
    ('7', [(0, 1)])
    """

    n: int
    answer: str | None
    agreement: float
    posterior: float
    stopped: Literal["", "lead", "confidence", "interrupted"]
    groups: tuple[VoteGroup, ...]
    traces: tuple[Trace, ...]
    failures: Mapping[int, str]
    n_tokens: int
    n_tokens_saved: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values; each trace as its own `to_json`."""
        return {
            "n": self.n,
            "answer": self.answer,
            "agreement": self.agreement,
            "posterior": self.posterior,
            "stopped": self.stopped,
            "groups": [{"answer": group.answer, "samples": list(group.samples)} for group in self.groups],
            "failures": {str(place): text for place, text in self.failures.items()},
            "n_tokens": self.n_tokens,
            "n_tokens_saved": self.n_tokens_saved,
            "traces": [trace.to_json() for trace in self.traces],
        }


def posterior(first: int, second: int) -> float:
    """The probability that an answer with `first` votes is more frequent than one with `second`.

    Under a uniform Dirichlet prior the share of the first among both is Beta(first + 1, second + 1); returned is its
    mass above 1/2, which for whole numbers is a binomial sum.

    >>> posterior(3, 0), posterior(2, 2)
    (0.9375, 0.5)
    """
    n = first + second + 1
    favourable: int = sum(math.comb(n, k) for k in range(first + 1))
    return float(favourable / 2**n)


def check_vote(n: int, confidence: float | None) -> None:
    """Raises OptionError for a number of samples or a confidence out of range."""
    if type(n) is not int or not 1 <= n <= MAX_SAMPLES:
        raise OptionError(f"n is {n!r}, expected a whole number of samples from 1 to {MAX_SAMPLES:,}.")
    if confidence is not None and not (isinstance(confidence, (int, float)) and 0.5 < confidence < 1.0):
        raise OptionError(f"confidence is {confidence!r}, expected a number above 0.5 and below 1.")


class Voting:
    """Draws samples of one run and counts their answers; `stop()` ends it after the tokens under way.

    run: whose prompt and first `at` output tokens the samples share; it is not touched but for its prefill.
    limit_bytes: what the device gives, None refuses nothing.
    The other arguments are those of `Reasoner.vote`.
    """

    def __init__(
        self,
        run: Stream,
        n: int,
        *,
        at: int = 0,
        width: int | None = None,
        ask_answer: bool = True,
        stop_early: bool = True,
        confidence: float | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        check_vote(n, confidence)
        n_steps = len(run.run.steps)
        if type(at) is not int or not 0 <= at <= n_steps:
            raise OptionError(f"at is {at!r}, expected from 0 (the prompt) to {n_steps}, the output tokens there are.")
        self.n = n
        self._source, self._at = run, at
        self._asks, self._stops_early, self._confidence = ask_answer, stop_early, confidence
        request = run.request
        n_shared = len(request.prompt_ids) + at - 1
        held = n_positions(len(request.prompt_ids) + n_steps)  # by the run itself
        if n_shared >= MIN_SHARED and n_steps - at < CACHE_STEP - 1:  # else the samples share a copy (`shared_prefix`)
            held -= n_shared
        held *= kv_bytes_here(request.plan)
        limit = None if limit_bytes is None else limit_bytes - held
        plan = plan_rows([request] * n, width, limit_bytes=limit, n_shared=n_shared)
        self._width, self._planned_bytes = plan.workload.n_sequences, plan.peak_bytes + held
        self._samples: list[Stream] = []
        self._ended: dict[int, Trace] = {}
        self.is_stopped = False

    def stop(self) -> None:
        """End after the tokens under way. Safe to call from a signal handler."""
        self.is_stopped = True
        for stream in list(self._samples) or [self._source]:  # before the first sample there is the prefill
            stream.stop()

    def work(self, progress: VoteProgress | None = None) -> Vote:
        """Draw until the vote is decided. Raises BatchError where every sample failed, and DamagedModelError."""
        stopped: Decision = ""
        with Scheduler(
            self._source.request.model,
            width=self._width,
            planned_bytes=self._planned_bytes,
            ask_answer=self._asks,
            drafts=self._source.request.drafts,
        ) as scheduler:
            self._prefill()
            while not stopped and not (self.is_stopped or scheduler.is_stopped) and len(self._ended) < self.n:
                while scheduler.has_room and len(self._samples) < self.n:
                    scheduler.add(self._new_sample())
                ended = scheduler.step()
                for stream in ended:
                    self._end(stream, progress)
                stopped = self._decided() if ended else ""
        for stream in self._samples:
            stream.run.finish = stream.run.finish or ("interrupted", "the vote was decided without it")
            stream.release_cache()
        vote = self._vote(stopped)
        if vote.failures and len(vote.failures) == len(self._samples):
            raise BatchError(
                f"All {self.n:,} samples failed. Sample 0: {vote.failures[0]}",
                traces=vote.traces,
                failures={place: stream.failure for place, stream in enumerate(self._samples) if stream.failure},
            )
        return vote

    def _prefill(self) -> None:
        """Feed the prompt that all samples share, once."""
        try:
            for _ in self._source.prefill():
                pass
        except (RuntimeError, MemoryError) as error:
            self._source.fail(error)
            assert self._source.failure is not None, "it has just failed"
            raise self._source.failure from error

    def _new_sample(self) -> Stream:
        seed = question_seed(resolved(self._source.request.sampling.seed), len(self._samples))
        self._samples.append(self._source.fork(at=self._at, seed=seed))
        return self._samples[-1]

    def _end(self, stream: Stream, progress: VoteProgress | None) -> None:
        """Take the answer of a sample that has ended."""
        place = self._samples.index(stream)
        trace = stream.trace()
        if trace.finish_reason == "interrupted" and stream.failure is None:
            return  # it was stopped, which is no vote
        self._ended[place] = trace
        if progress is not None:
            progress(place, trace, self._groups())

    def _groups(self) -> tuple[VoteGroup, ...]:
        return count_votes(
            {
                place: trace.answer
                for place, trace in sorted(self._ended.items())
                if trace.answer is not None and self._samples[place].failure is None
            }
        )

    def _decided(self) -> Decision:
        n_to_come = self.n - len(self._ended)
        return decided(self._groups(), n_to_come, stop_early=self._stops_early, confidence=self._confidence)

    def _vote(self, stopped: Decision) -> Vote:
        groups = self._groups()
        first, second = _two_largest(groups)
        traces = [stream.trace() for stream in self._samples]
        n_each = [len(trace.ids) - self._at + trace.asked_tokens for trace in traces]
        n_ended = len(self._ended)
        n_whole = sum(n_each[place] for place in self._ended)
        n_cut = sum(n_each) - n_whole
        expected = n_whole / n_ended * (self.n - n_ended) if n_ended else 0.0
        return Vote(
            n=self.n,
            answer=groups[0].answer if groups else None,
            agreement=first / n_ended if n_ended else 0.0,
            posterior=posterior(first, second),
            stopped=stopped or ("interrupted" if n_ended < self.n else ""),
            groups=groups,
            traces=tuple(traces),
            failures={
                place: error_text(stream.failure)
                for place, stream in enumerate(self._samples)
                if stream.failure is not None
            },
            n_tokens=sum(n_each),
            n_tokens_saved=max(0, round(expected) - n_cut),
        )


def count_votes(answers: Mapping[int, str]) -> tuple[VoteGroup, ...]:
    """The answers of samples by their places, ascending, grouped by what they say; the largest group first.

    An answer is compared with the first of each group, so that n answers in k groups cost at most n times k.

    >>> [group.samples for group in count_votes({0: "1/2", 1: "7", 2: "0.5"})]
    [(0, 2), (1,)]
    """
    groups: list[list[int]] = []
    for place, answer in answers.items():
        group = next((each for each in groups if compare(answers[each[0]], answer)), None)
        if group is None:
            groups.append(group := [])
        group.append(place)
    groups.sort(key=lambda group: (-len(group), group[0]))
    return tuple(
        VoteGroup(answer=_usual([answers[place] for place in group]), samples=tuple(group)) for group in groups
    )


def decided(groups: Sequence[VoteGroup], n_to_come: int, *, stop_early: bool, confidence: float | None) -> Decision:
    """Why no more samples are needed, "" where they are. n_to_come: those under way and those not begun."""
    first, second = _two_largest(groups)
    if not n_to_come or not first:
        return ""
    if stop_early and first > second + n_to_come:
        return "lead"
    return "confidence" if confidence is not None and posterior(first, second) >= confidence else ""


def _two_largest(groups: Sequence[VoteGroup]) -> tuple[int, int]:
    """The votes of the first and of the second answer."""
    sizes = [len(group.samples) for group in groups]
    return (sizes[0] if sizes else 0), (sizes[1] if len(sizes) > 1 else 0)


def _usual(answers: Sequence[str]) -> str:
    """The spelling that most have, of equally frequent ones the first."""
    spellings = Counter(normalise(answer) for answer in answers)
    usual = max(spellings, key=lambda spelling: spellings[spelling])
    return next(answer for answer in answers if normalise(answer) == usual)
