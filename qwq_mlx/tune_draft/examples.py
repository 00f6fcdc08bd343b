"""Saved traces become examples: the ids of a prompt, and the ids that the target wrote behind it.

Four kinds of files are read, told apart by how they begin:

    what `Trace.save` writes        one trace
    what `--input` and `--output`   many traces, one a line
    a server's history              its runs, also while it goes on
    recorded outputs                JSON lines with "prompt" and "response", perhaps "system"; other fields are ignored

Traces hold ids, and whether those mean the same to the drafter is checked by their texts, before a weight is read. The
texts of recorded outputs are encoded by the drafter's own tokenizer.

Does not: cut examples to a length (`windows` does).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwq_mlx.engine.detokenizer import Pieces, first_other
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.generate.question_file.results import read_traces
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer
from qwq_mlx.trace.trace import Trace

__all__ = ["Example", "Split", "read_examples", "split_by_problem"]

_ADVICE = "Give traces that were saved, or JSON lines with prompt and response."
_SQLITE = b"SQLite format 3\0"
_HISTORY_SCHEMA = 1
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


class _Written(NamedTuple):
    """What a model wrote with ids: texts are what each let out, is_written whether it was drawn."""

    question: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    texts: Sequence[str]
    is_written: Sequence[bool]


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
            if isinstance(found, _Written):
                _check_ids(found, pieces, where, folder)
                examples.append(_of_written(found))
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
    problems (at least one, and not all), chosen by their texts and the seed, whatever their order.
    Raises OptionError where nothing would be left to train or to measure on.
    """
    if held_out is None:
        problems = sorted({each.problem for each in examples}, key=lambda problem: _digest(problem, seed))
        if len(problems) < 2:
            raise OptionError(
                f"traces hold {len(problems)} problem, expected at least 2: one is held out to measure on. Give traces "
                "of more problems, or others as `held_out`."
            )
        measured = set(problems[: min(max(1, round(share * len(problems))), len(problems) - 1)])
        held_out = [each for each in examples if each.problem in measured]
    else:
        measured = {each.problem for each in held_out}
    training = [each for each in examples if each.problem not in measured]
    if not training:
        raise OptionError("traces hold only problems that are held out, so nothing is left to train on. Give others.")
    return Split(training, list(held_out))


def _digest(problem: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {problem}".encode()).digest()


def _outputs(path: Path) -> Iterator[tuple[str, _Written | dict[str, Any]]]:
    """The outputs of a file with what messages call them."""
    if _begins_as_sqlite(path):
        yield from _history(path)
        return
    raw = read_regular_file(path, limit_bytes=_MAX_BYTES, expected="traces", advice=_ADVICE)
    lines = raw.split(b"\n")
    first = parse_json_object(lines[0], what=f"{path}: line 1", advice=_ADVICE)
    is_recorded = "response" in first  # whatever other fields it has
    if not is_recorded and ("format" in first or ("schema_version" in first and "trace" not in first)):
        yield str(path), _of_trace(Trace.load(path))
    elif not is_recorded and "index" in first and "run" in first:
        for place, (_, trace) in enumerate(read_traces(path), start=1):
            if trace is not None:
                yield f"{path}: line {place:,}", _of_trace(trace)
    else:
        for place, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}: line {place:,}"
                yield where, parse_json_object(line, what=where, advice=_ADVICE)


def _begins_as_sqlite(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def _history(path: Path) -> Iterator[tuple[str, _Written]]:
    """The runs that a server kept (`serve.history` says how). Raises SourceError."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
            if schema != _HISTORY_SCHEMA:
                raise SourceError(f"{path}: has schema {schema}, expected {_HISTORY_SCHEMA}, a history of `serve`.")
            for run_id, raw in connection.execute("SELECT id, request FROM runs ORDER BY created, id").fetchall():
                lines: list[bytes] = []
                steps = connection.execute("SELECT start, lines FROM steps WHERE run = ? ORDER BY start", (run_id,))
                for start, packed in steps:
                    if not 0 <= start <= len(lines):
                        raise ValueError(f"{run_id}: tokens {len(lines):,} to {start:,} are missing")
                    lines[start:] = zlib.decompress(packed).splitlines()
                yield f"{path}: {run_id}", _of_run(json.loads(raw), [json.loads(line) for line in lines])
    except (OSError, sqlite3.Error, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: is no history of `serve`, or is damaged ({error}). {_ADVICE}") from error


def _of_run(request: dict[str, Any], steps: Sequence[dict[str, Any]]) -> _Written:
    """Raises TypeError, KeyError, AttributeError or ValueError for what no server wrote."""
    prompt, ids = [int(each) for each in request.get("prompt_ids", ())], [int(step["id"]) for step in steps]
    if any(each < 0 for each in (*prompt, *ids)):
        raise ValueError("an id is below 0")
    return _Written(
        str(request.get("question", "")),
        prompt,
        ids,
        [str(step["text"]) for step in steps],
        [not step["is_injected"] for step in steps],
    )


def _of_trace(trace: Trace) -> _Written:
    is_written = [each is not None for each in trace.logprobs]
    return _Written(trace.question, trace.prompt_ids, trace.ids, trace.texts, is_written)


def _of_written(written: _Written) -> Example:
    return Example(
        problem=written.question.strip(),
        prompt_ids=tuple(written.prompt_ids),
        ids=tuple(written.ids),
        is_written=tuple(written.is_written),
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


def _check_ids(written: _Written, pieces: Pieces, where: str, folder: Path) -> None:
    """Refuse a drafter to which the ids of a trace are another text. The text ends before a stop id or text."""
    if max((*written.prompt_ids, *written.ids), default=0) < pieces.n_ids:
        at = first_other(pieces, written.ids, written.texts)
        if at is None:
            return
        token_id, wrote = written.ids[at], written.texts[at]
        found = f"id {token_id:,} wrote {wrote!r}, in the drafter it is {pieces[token_id].decode(errors='replace')!r}"
    else:
        largest = max(*written.prompt_ids, *written.ids)
        found = f"id {largest:,} is beyond the drafter's {pieces.n_ids:,} ids"
    raise OptionError(
        f"draft is {json.dumps(str(folder))}, whose vocabulary is another than that of the traces ({where}: {found}). "
        "Give a drafter of the same tokenizer."
    )
