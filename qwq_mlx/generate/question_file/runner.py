"""A file of questions becomes a file of traces, one question at a time, and goes on by itself where it was cut off.

Question i is drawn with a seed made from the batch's seed and i alone, so an interrupted file that was finished later
is, but for "measured", byte for byte the file of one unbroken run. A line that is there is never written again, but
where memory ran out, which is no answer: the next run tries that question again, and the others are not held up by it.
A line that depends on something else (weights, settings, seed, the question's own text) is refused instead of mixed
with.

Does not: run questions side by side, or compare answers with what was expected.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwq_mlx.errors import (
    DamagedModelError,
    GenerationError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    TemplateLimitError,
)
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.generate.question_file.questions import Question
from qwq_mlx.generate.question_file.results import Results, result_line
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.template import template_digest
from qwq_mlx.model.tokenizer import read_chat_template
from qwq_mlx.options import Limits, Sampling, Thinking, to_json
from qwq_mlx.trace.trace import Trace

__all__ = ["BatchProgress", "QuestionFile", "question_seed"]

_TICK_S = 0.5


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
    """Answers questions into an open Results; `stop()` ends it after the token under way, that question unwritten."""

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
        self._run: Stream | None = None
        self._progress: Callable[[BatchProgress], None] | None = None
        self._started_s = self._told_s = 0.0
        self._n_before = self._n_tokens = self._n_failed = self._n_out_of_memory = 0
        self._waiting: set[int] = set()
        self.is_stopped = False
        self._check()

    def stop(self) -> None:
        """End after the token under way. Safe to call from a signal handler."""
        self.is_stopped = True
        if self._run is not None:
            self._run.stop()

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
        for question in [*again, *self._questions[len(lines) :]]:
            line = None if self.is_stopped else self._answered(question)
            if line is None:
                break
            self._results.write(line)
            self._waiting.discard(question.index)
            self._count(line)
            self._n_tokens += len(line["trace"]["ids"]) if "trace" in line else 0
            stand = self._tell(0, line)
        return stand

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

    def _answered(self, question: Question) -> dict[str, Any] | None:
        """The question's line; None where the batch was stopped meanwhile."""
        head = {
            "index": question.index,
            "id": question.id,
            "expected": question.expected,
            "question_sha256": question.sha256,
            "run": self._run_values,
        }
        seed = question_seed(self._sampling.seed or 0, question.index)
        try:
            self._run = self._reasoner.stream(
                question.messages,
                system_prompt=self._system_prompt,
                sampling=replace(self._sampling, seed=seed),
                limits=self._limits,
                thinking=self._thinking,
            )
            if self.is_stopped:  # from here on stop() reaches the run itself
                return None
            for step in self._run:
                self._tick(step.index + 1)
            if self._asks and not self.is_stopped:
                self._run.ask_answer()
            trace = self._run.trace()
        except (TemplateLimitError, DamagedModelError):
            raise  # the machine's fault, not the question's: it must not be written down as its answer
        except PromptError as error:
            return {**head, "error": str(error), "error_type": type(error).__name__}
        except GenerationError as error:
            failed = {**head, "error": str(error), "error_type": type(error).__name__}
            return result_line(failed, error.trace) if isinstance(error.trace, Trace) else failed
        finally:
            self._run = None
        is_cut = trace.finish_reason == "interrupted" or (self._asks and self.is_stopped)
        return None if is_cut else result_line(head, trace)

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


def question_seed(seed: int, index: int) -> int:
    """The seed of question `index`: 32 bits of a sha256 of both, so neighbouring batches share no stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")


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
