"""Samples of every problem by one model, on the batch engine, into a file that a killed process leaves whole.

The file is one of results of questions, so it goes on where it was cut, to the same bytes, and refuses other settings
by name; a question here is one sample of one problem.

Does not: judge.
"""

from __future__ import annotations

from dataclasses import replace

from qwq_mlx.errors import OutOfMemoryError
from qwq_mlx.evaluate.folder import Evaluation
from qwq_mlx.evaluate.models import CheckedModel
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.generate.question_file.questions import Question
from qwq_mlx.generate.question_file.results import Results, read_traces
from qwq_mlx.generate.question_file.runner import QuestionFile
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Limits, Settings, from_json

__all__ = ["is_complete", "limits_of", "question_file", "question_text", "samples_asked"]


def question_text(evaluation: Evaluation, question: str) -> str:
    """A problem's question with the instruction behind it."""
    instruction = evaluation.setup.instruction
    return f"{question}\n{instruction}" if instruction else question


def samples_asked(evaluation: Evaluation) -> list[Question]:
    """The samples as questions, in the order of the lines: all problems once, then all again."""
    asked: list[Question] = []
    for sample in range(evaluation.samples):
        for problem in evaluation.problems:
            text = question_text(evaluation, problem.question)
            asked.append(
                Question(
                    index=len(asked),
                    id=f"{problem.id}, sample {sample}" if sample else problem.id,
                    messages=text,
                    expected=problem.expected,
                    sha256=sha256_json({"id": problem.id, "question": text, "sample": sample}),
                )
            )
    return asked


def limits_of(evaluation: Evaluation, model: CheckedModel) -> Limits:
    """The limits of a model's samples: where no context was asked for, the room that the longest of them can need.

    So the memory plan holds many rows side by side. A question has at most as many tokens as bytes.
    """
    limits = _settings(evaluation)[1]
    if limits.context is not None or limits.max_tokens is None:
        return limits
    longest = max(len(question_text(evaluation, problem.question).encode()) for problem in evaluation.problems)
    return replace(limits, context=min(model.context, longest + model.n_prompt + limits.max_tokens))


def is_complete(evaluation: Evaluation, label: str) -> bool:
    """Whether every sample of a model is in its file, none of them to be tried again for lack of memory."""
    path = evaluation.traces(label)
    if not path.exists():
        return False
    n_lines = 0
    for line, _ in read_traces(path):
        n_lines += line.get("error_type") != OutOfMemoryError.__name__
    return n_lines >= evaluation.samples * len(evaluation.problems)


def question_file(
    evaluation: Evaluation, model: CheckedModel, reasoner: Reasoner, results: Results, *, width: int | None
) -> QuestionFile:
    """What answers the samples that are not answered yet. width: samples side by side; None as for any batch.

    Raises OptionError where the lines that are there were made in other settings.
    """
    sampling, _, thinking = _settings(evaluation)
    return QuestionFile(
        reasoner,
        samples_asked(evaluation),
        results,
        sampling=sampling,
        limits=limits_of(evaluation, model),
        thinking=thinking,
        system_prompt=evaluation.setup.system_prompt,
        width=width,
    )


def _settings(evaluation: Evaluation) -> Settings:
    return from_json(evaluation.setup.settings, where=str(evaluation.folder))
