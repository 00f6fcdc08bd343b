"""Saved traces become examples: the ids of a prompt, and the ids that the target wrote behind it.

Three kinds of files are read, told apart by their first line:

    what `Trace.save` writes        one trace
    what `--input` and `--output`   many traces, one a line
    recorded outputs                JSON lines with "prompt" and "response", perhaps "system"; other fields are ignored

Traces hold ids, and whether those mean the same to the drafter is checked by their texts, before a weight is read. The
texts of recorded outputs are encoded by the drafter's own tokenizer.

Does not: cut examples to a length (`windows` does).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwq_mlx.engine.detokenizer import Pieces, decode
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.generate.question_file.results import read_traces
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer
from qwq_mlx.trace.trace import Trace

__all__ = ["Example", "Split", "read_examples", "split_by_problem"]

_ADVICE = "Give traces that were saved, or JSON lines with prompt and response."
_MAX_BYTES = 4 << 30
_ANY_LENGTH = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One output of the target.

    problem: the text that was asked; examples of one problem are held out together.
    prompt_ids: of the whole prompt.
    ids: what was written behind it.
    is_written: of each id, whether the target drew it; answer cues and nudges were put there.
    """

    problem: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    is_written: tuple[bool, ...]


class Split(NamedTuple):
    """What is trained on, and what is measured on."""

    training: list[Example]
    held_out: list[Example]


def read_examples(paths: Sequence[str | Path], tokenizer: LoadedTokenizer, *, folder: Path) -> list[Example]:
    """All outputs of some files that hold at least one id. tokenizer: the drafter's, of this folder.

    Raises SourceError for a file that is missing, damaged or of another kind; LoadError and OptionError where the
    drafter's tokenizer is not that of the traces; PromptError where it has no chat template for recorded prompts.
    """
    pieces = Pieces(tokenizer)
    examples: list[Example] = []
    for path in map(Path, paths):
        for where, found in _outputs(path):
            if isinstance(found, Trace):
                _check_ids(found, pieces, where, folder)
                examples.append(_of_trace(found))
            else:
                examples.append(_of_recorded(found, tokenizer, where))
    examples = [each for each in examples if any(each.is_written)]
    if not examples:
        raise SourceError(f"{', '.join(map(str, paths))}: no output holds a token. {_ADVICE}")
    return examples


def split_by_problem(
    examples: Sequence[Example], held_out: Sequence[Example] | None, *, share: float, seed: int
) -> Split:
    """Hold out whole problems.

    held_out: examples to measure on; those of the same problems are not trained on. None takes a share of the
    problems (at least one), chosen by their texts and the seed, whatever their order.
    Raises OptionError where nothing would be left to train or to measure on.
    """
    if held_out is None:
        problems = sorted({each.problem for each in examples}, key=lambda problem: _digest(problem, seed))
        if len(problems) < 2:
            raise OptionError(
                f"traces hold {len(problems)} problem, expected at least 2: one is held out to measure on. Give traces "
                "of more problems, or others as `held_out`."
            )
        measured = set(problems[: max(1, round(share * len(problems)))])
        held_out = [each for each in examples if each.problem in measured]
    else:
        measured = {each.problem for each in held_out}
    training = [each for each in examples if each.problem not in measured]
    if not training:
        raise OptionError("traces hold only problems that are held out, so nothing is left to train on. Give others.")
    return Split(training, list(held_out))


def _digest(problem: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {problem}".encode()).digest()


def _outputs(path: Path) -> Iterator[tuple[str, Trace | dict[str, Any]]]:
    """The outputs of a file with what messages call them."""
    raw = read_regular_file(path, limit_bytes=_MAX_BYTES, expected="traces", advice=_ADVICE)
    lines = raw.split(b"\n")
    first = parse_json_object(lines[0], what=f"{path}: line 1", advice=_ADVICE)
    if "format" in first or ("schema_version" in first and "trace" not in first):
        yield str(path), Trace.load(path)
    elif "index" in first and "run" in first:
        for place, (_, trace) in enumerate(read_traces(path), start=1):
            if trace is not None:
                yield f"{path}: line {place:,}", trace
    else:
        for place, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}: line {place:,}"
                yield where, parse_json_object(line, what=where, advice=_ADVICE)


def _of_trace(trace: Trace) -> Example:
    return Example(
        problem=trace.question.strip(),
        prompt_ids=trace.prompt_ids,
        ids=trace.ids,
        is_written=tuple(each is not None for each in trace.logprobs),
    )


def _of_recorded(row: dict[str, Any], tokenizer: LoadedTokenizer, where: str) -> Example:
    prompt, response, system = row.get("prompt"), row.get("response"), row.get("system")
    if not isinstance(prompt, str) or not isinstance(response, str) or not isinstance(system, str | None):
        raise SourceError(
            f"{where}: has the fields {', '.join(row)[:200]}; expected prompt and response, and system if there is "
            f"one, as texts. {_ADVICE}"
        )
    ids = encode_text(tokenizer, response)
    return Example(
        problem=prompt.strip(),
        prompt_ids=tuple(prompt_ids(tokenizer, prompt, system_prompt=system, context=_ANY_LENGTH)),
        ids=tuple(ids),
        is_written=(True,) * len(ids),
    )


def _check_ids(trace: Trace, pieces: Pieces, where: str, folder: Path) -> None:
    """Refuse a drafter to which the ids of a trace are another text. The text ends before a stop id or text."""
    if max((*trace.prompt_ids, *trace.ids), default=0) < pieces.n_ids:
        text = decode(pieces, trace.ids)
        if text.startswith(trace.text.rstrip("\ufffd")):
            return
        end = next(place for place in range(len(trace.text)) if text[place : place + 1] != trace.text[place])
        ends = itertools.accumulate(map(len, trace.texts))
        at = next(place for place, written in enumerate(ends) if written > end)
        token_id, written = trace.ids[at], trace.texts[at]
        found = f"id {token_id:,} wrote {written!r}, in the drafter it is {pieces[token_id].decode(errors='replace')!r}"
    else:
        largest = max(*trace.prompt_ids, *trace.ids)
        found = f"id {largest:,} is beyond the drafter's {pieces.n_ids:,} ids"
    raise OptionError(
        f"draft is {json.dumps(str(folder))}, whose vocabulary is another than that of the traces ({where}: {found}). "
        "Give a drafter of the same tokenizer."
    )
