"""A file of questions becomes a file of traces, several side by side, and goes on by itself where it was cut off.

Question i is drawn with a seed made from the batch's seed and i alone, so an interrupted file that was finished later
is, but for "measured", byte for byte the file of one unbroken run, in whatever width (exactly with a model that was
loaded with `reproducible`, else up to near-ties). Lines are written in the order of the questions, so one that ends
early waits for those before it. A line that is there is never written again, but where memory ran out, which is no
answer: the next run tries that question again, and the others are not held up by it. A line that depends on something
else (weights, settings, seed, the question's own text) is refused instead of mixed with.

Does not: compare answers with what was expected.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwq_mlx.errors import (
    GenerationError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    QwqError,
    TemplateLimitError,
)
from qwq_mlx.generate.batch import plan_width, question_seed
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.generate.question_file.questions import Question
from qwq_mlx.generate.question_file.results import Results, result_line
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.template import template_digest
from qwq_mlx.model.tokenizer import read_chat_template
from qwq_mlx.options import Limits, Sampling, Thinking, to_json
from qwq_mlx.trace.trace import Trace

__all__ = ["BatchProgress", "QuestionFile"]

_TICK_S = 0.5
_MAX_AHEAD = 8  # widths of questions that may be under way or wait for one before them


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """How far a file of questions is.

    n_done: lines in the file, but for those to be tried again.
    n_total: questions.
    n_before: lines from earlier runs.
    n_failed: lines with an error.
    n_out_of_memory: of those, what the next run tries again.
    n_tokens, seconds: of this run.
    last: the line just written, None before and between.
    """

    n_done: int
    n_total: int
    n_before: int
    n_failed: int
    n_out_of_memory: int
    n_tokens: int
    seconds: float
    last: dict[str, Any] | None


class QuestionFile:
    """Answers questions into an open Results; `stop()` ends it after the tokens under way, those questions unwritten.

    width: questions side by side; None takes as many as the plan of their memory allows, at most 8.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        questions: Sequence[Question],
        results: Results,
        *,
        sampling: Sampling,
        limits: Limits,
        thinking: Thinking,
        system_prompt: str | None = None,
        ask_answer: bool = False,
        width: int | None = None,
    ) -> None:
        self._reasoner = reasoner
        self._questions = questions
        self._results = results
        seed = sampling.seed if sampling.seed is not None else _seed_of(results)
        self._sampling = replace(reasoner.resolved(sampling), seed=seed)
        self._limits, self._thinking, self._system_prompt = limits, thinking, system_prompt
        self._asks = ask_answer
        self._run_values = {
            "model_sha256": model_digest(reasoner.model.folder),
            "compute_type": reasoner.model.compute_type,
            "settings": to_json(self._sampling, limits, thinking),
            "system_prompt": system_prompt,
            **({"ask_answer": True} if ask_answer else {}),  # left out where it is off, as in files from before
        }
        template = reasoner.model.tokenizer.chat_template
        if template is not None and template != read_chat_template(reasoner.model.folder):
            self._run_values["template_sha256"] = template_digest(template)
        self._plan = plan_width(
            reasoner.model,
            reasoner.fit(limits).plan,
            len(questions),
            width,
            limit_bytes=reasoner.limit_bytes,
        )
        self._runs: dict[Stream, Question] = {}
        self._progress: Callable[[BatchProgress], None] | None = None
        self._started_s = self._told_s = 0.0
        self._n_before = self._n_tokens = self._n_failed = self._n_out_of_memory = 0
        self._waiting: set[int] = set()
        self.is_stopped = False
        self._check()

    def stop(self) -> None:
        """End after the tokens under way. Safe to call from a signal handler."""
        self.is_stopped = True
        for run in list(self._runs):
            run.stop()

    def work(self, progress: Callable[[BatchProgress], None] | None = None) -> BatchProgress:
        """Answer what is not answered yet; progress is told before the first question, after each, and meanwhile.

        A question that cannot be answered (too long for the context, logits that are not finite) gets a line with its
        "error", and so does one in which memory ran out; those of an earlier run are tried again first. Raises
        SavingError where the disk does not take a line, TemplateLimitError where an unknown chat template took too
        long; the lines before are whole.
        """
        lines = self._results.lines
        self._waiting = {line["index"] for line in lines if _ran_out(line)}
        self._started_s, self._n_before = time.perf_counter(), len(lines) - len(self._waiting)
        self._n_tokens, self._progress = 0, progress
        self._n_failed = self._n_out_of_memory = 0
        for each in lines:
            if each["index"] not in self._waiting:
                self._count(each)
        stand = self._tell(0)
        again = [self._questions[index] for index in sorted(self._waiting)]
        for line in self._answered([*again, *self._questions[len(lines) :]]):
            self._results.write(line)
            self._waiting.discard(line["index"])
            self._count(line)
            self._n_tokens += len(line["trace"]["ids"]) if "trace" in line else 0
            stand = self._tell(0, line)
        return stand

    def _answered(self, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """The lines of these questions in their order, until the batch is stopped.

        An unknown chat template that took too long is the machine's fault, not the question's: it must not be written
        down as its answer, so it is raised once the questions before it have their lines.
        """
        to_come, order, ready = deque(questions), deque[int](), dict[int, dict[str, Any] | None]()
        width, slow = self._plan.workload.n_sequences, None
        with Scheduler(
            self._reasoner.model,
            width=width,
            planned_bytes=self._plan.peak_bytes,
            ask_answer=self._asks,
            drafts=self._reasoner.drafts,
        ) as scheduler:
            while order or (to_come and not self.is_stopped):
                while to_come and not self.is_stopped and scheduler.has_room and len(order) < _MAX_AHEAD * width:
                    question = to_come.popleft()
                    try:
                        ended = self._begin(question, scheduler)
                    except TemplateLimitError as error:
                        slow = error
                        to_come.clear()
                        break
                    order.append(question.index)
                    ready.update({} if ended is None else {question.index: ended})
                for run in scheduler.step():
                    question = self._runs.pop(run)
                    ready[question.index] = self._line(question, run)
                while order and order[0] in ready:
                    line = ready.pop(order.popleft())
                    if line is None:  # it was stopped; those behind it are answered again
                        return
                    yield line
                self._tick(sum(len(run.run.steps) for run in self._runs))
        if slow is not None:
            raise slow

    def _count(self, line: Mapping[str, Any]) -> None:
        self._n_failed += "error" in line
        self._n_out_of_memory += _ran_out(line)

    def _tick(self, n_now: int) -> None:
        """A token of the question under way; told at most every half second."""
        if time.perf_counter() - self._told_s > _TICK_S:
            self._tell(n_now)

    def _tell(self, n_now: int, last: dict[str, Any] | None = None) -> BatchProgress:
        self._told_s = time.perf_counter()
        stand = BatchProgress(
            n_done=len(self._results.lines) - len(self._waiting),
            n_total=len(self._questions),
            n_before=self._n_before,
            n_failed=self._n_failed,
            n_out_of_memory=self._n_out_of_memory,
            n_tokens=self._n_tokens + n_now,
            seconds=self._told_s - self._started_s,
            last=last,
        )
        if self._progress is not None:
            self._progress(stand)
        return stand

    def _begin(self, question: Question, scheduler: Scheduler) -> dict[str, Any] | None:
        """Let the question's run enter; returns its line where it cannot be asked."""
        try:
            run = self._reasoner.stream(
                question.messages,
                system_prompt=self._system_prompt,
                sampling=replace(self._sampling, seed=question_seed(self._sampling.seed or 0, question.index)),
                limits=self._limits,
                thinking=self._thinking,
            )
        except TemplateLimitError:
            raise
        except PromptError as error:
            return self._failed(question, error)
        self._runs[run] = question
        scheduler.add(run)
        return None

    def _line(self, question: Question, run: Stream) -> dict[str, Any] | None:
        """The line of a run that has ended; None where the batch was stopped meanwhile."""
        if isinstance(run.failure, GenerationError):
            failed = self._failed(question, run.failure)
            return result_line(failed, run.failure.trace) if isinstance(run.failure.trace, Trace) else failed
        if run.failure is not None:
            raise run.failure
        trace = run.trace()
        is_cut = trace.finish_reason == "interrupted" or (self._asks and self.is_stopped)
        return None if is_cut else result_line(self._head(question), trace)

    def _head(self, question: Question) -> dict[str, Any]:
        return {
            "index": question.index,
            "id": question.id,
            "expected": question.expected,
            "question_sha256": question.sha256,
            "run": self._run_values,
        }

    def _failed(self, question: Question, error: QwqError) -> dict[str, Any]:
        return {**self._head(question), "error": str(error), "error_type": type(error).__name__}

    def _check(self) -> None:
        """Raises OptionError where lines that are there do not belong to these questions, weights and settings."""
        path, lines = self._results.path, self._results.lines
        if len(lines) > len(self._questions):
            raise OptionError(
                f"{path}: holds {len(lines):,} results, the input {len(self._questions):,} questions. "
                "Give the input that it was made of, or another output."
            )
        for line, question in zip(lines, self._questions, strict=False):
            if line.get("question_sha256") != question.sha256:
                raise OptionError(
                    f"{path}: question {question.index:,} (id {question.id!r}) is another than the one answered there. "
                    "Give the input that it was made of, or another output."
                )
            if line["run"] != self._run_values:
                raise OptionError(
                    f"{path}: question {question.index:,} was answered with other values of "
                    f"{', '.join(_differing(line['run'], self._run_values))}. Run it with the same, or choose another "
                    "output."
                )


def _ran_out(line: Mapping[str, Any]) -> bool:
    return line.get("error_type") == OutOfMemoryError.__name__


def _seed_of(results: Results) -> int:
    """The seed that a file was begun with, or a new one."""
    try:
        seed = results.lines[0]["run"]["settings"]["sampling"]["seed"]
    except (IndexError, KeyError, TypeError):
        seed = None
    return seed if type(seed) is int else secrets.randbits(32)


def _differing(actual: Any, expected: Any, name: str = "") -> list[str]:
    """Names of the values that differ, as deep as both have objects."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        return [
            each
            for key in sorted(actual.keys() | expected.keys())
            for each in _differing(actual.get(key), expected.get(key), key)
        ]
    return [] if json.dumps(actual) == json.dumps(expected) else [name]
