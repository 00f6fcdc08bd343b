"""Solve held-out problems with the exported checkpoint and with its 4-bit conversion, in MLX, and count.

All sequences of a batch advance in step (a prompt's ids first, then drawn ones), so no padding or mask is needed; rows
that ended are taken out of the cache as the batch goes on. The settings are those of generation_config.json at
temperature 0.7, or greedy.

Does not: stream, watch loops, or time anything; qwq_mlx.generate and qwq_mlx.bench do.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

import qwq_mlx.convert as conversion
from pocket import data
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.model.load import LoadedModel, load_model
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.pocket import problems
from qwq_mlx.pocket.problems import Problem

__all__ = ["TREE_OF_THOUGHTS_ROWS", "evaluate"]

TREE_OF_THOUGHTS_ROWS = range(900, 1000)
"""Rows 901 to 1000 of the Game of 24 table that Tree of Thoughts (arXiv 2305.10601) sorts by difficulty."""

_BATCH = 50
_SHRINK_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Problems to solve with one setting and some weights."""

    name: str
    problems: Sequence[Problem]
    greedy: bool
    weights: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One batch of a task for one of the models."""

    place: Path
    weights: str
    task: str
    greedy: bool
    problems: Sequence[Problem]


def _tasks(game24_table: Path | None) -> Iterator[Task]:
    both = ("bf16", "4-bit")
    article, _, target = problems.ARTICLE_EQUATION.partition(" = ")
    parts = article.split()
    equation = problems.parentheses([int(part) for part in parts[::2]], "".join(parts[1::2]), int(target))
    yield Task(name="the article's equation", problems=[equation], greedy=True, weights=both)
    held_out = data.held_out_problems("parentheses", 500, seed=3, n=9)
    yield Task(name="parentheses, 9 numbers", problems=held_out, greedy=True, weights=both)
    yield Task(name="letters", problems=data.held_out_problems("letters", 500, seed=3), greedy=True, weights=both)
    yield Task(name="arithmetic", problems=data.held_out_problems("arithmetic", 500, seed=3), greedy=True, weights=both)
    if game24_table is not None:
        with game24_table.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        rows = [problems.game24([int(n) for n in table[row]["Puzzles"].split()]) for row in TREE_OF_THOUGHTS_ROWS]
        yield Task(name="Game of 24, rows 901 to 1000", problems=rows, greedy=True, weights=both)
        yield Task(name="Game of 24, rows 901 to 1000, T = 0.7", problems=rows, greedy=False, weights=both)
    yield Task(name="parentheses, 9 numbers, T = 0.7", problems=held_out[:100], greedy=False, weights=("4-bit",))


def evaluate(folder: Path, output: Path, *, game24_table: Path | None, n_processes: int = 3) -> None:
    """Score `folder` and a conversion of it; `output` becomes {weights: {task: {solved, n, mean_tokens}}}."""
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "pocket-4bit"
        conversion.convert_checkpoint(folder, converted, recipe="pocket-4bit")
        places = {"bf16": folder, "4-bit": converted}
        jobs = [
            Job(place=places[weights], weights=weights, task=task.name, greedy=task.greedy, problems=batch)
            for task in _tasks(game24_table)
            for weights in task.weights
            for batch in _batches(task.problems)
        ]
        found: dict[str, dict[str, dict[str, float]]] = {}
        with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
            for n_done, (job, solved, n_tokens) in enumerate(pool.imap(_run, jobs), start=1):
                score = found.setdefault(job.weights, {}).setdefault(job.task, {"solved": 0, "n": 0, "tokens": 0})
                score["solved"] += solved
                score["n"] += len(job.problems)
                score["tokens"] += n_tokens
                score["mean_tokens"] = round(score["tokens"] / score["n"], 1)
                print(
                    f"{n_done} of {len(jobs)} batches; {job.weights}, {job.task}: {score}", file=sys.stderr, flush=True
                )
                output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _batches(posed: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Longer expressions have more placements, so problems of a like length end together."""
    by_length = sorted(posed, key=lambda problem: len(problem.given))
    for start in range(0, len(by_length), _BATCH):
        yield by_length[start : start + _BATCH]


@cache
def _model(place: Path) -> LoadedModel:
    """The model with its codes, if any, unpacked to the same numbers: MLX's CPU backend is slow at batches of codes."""
    model = load_model(place)
    import_mlx_lm("mlx_lm.utils").dequantize_model(model.module)
    return model


def _run(job: Job) -> tuple[Job, int, int]:
    """One batch, in a worker: (job, problems solved, tokens written)."""
    model = _model(job.place)
    mx.random.seed(1)
    context = model.config.max_position_embeddings
    prompts = [prompt_ids(model.tokenizer, problem.question, context=context) for problem in job.problems]
    outputs = _continue(model, prompts, job.greedy)
    answers = [problems.boxed(model.tokenizer.hf.decode(ids)) for ids in outputs]
    solved = sum(map(problems.is_solved, job.problems, answers))
    return job, solved, sum(map(len, outputs))


def _continue(model: LoadedModel, prompts: list[list[int]], greedy: bool) -> list[list[int]]:
    cache = new_cache(model.module)
    rows = [list(prompt) for prompt in prompts]
    active = list(range(len(rows)))
    for at in range(model.config.max_position_embeddings - 1):
        logits = model.module(mx.array([[rows[row][at]] for row in active]), cache=cache)[:, 0].astype(mx.float32)
        drawn = mx.argmax(logits, axis=-1) if greedy else _draw(model, logits)
        for row, token in zip(active, drawn.tolist(), strict=True):
            if len(rows[row]) == at + 1:
                rows[row].append(token)
        if at % _SHRINK_EVERY == 0:
            going = [place for place, row in enumerate(active) if not _ended(rows[row], len(prompts[row]), model)]
            if not going:
                break
            if len(going) < len(active):
                for layer in cache:
                    layer.keys, layer.values = layer.keys[mx.array(going)], layer.values[mx.array(going)]
                active = [active[place] for place in going]
    return [_until_end(row[len(prompt) :], model) for row, prompt in zip(rows, prompts, strict=True)]


def _ended(row: list[int], n_prompt: int, model: LoadedModel) -> bool:
    return not model.stop_ids.isdisjoint(row[n_prompt:])


def _until_end(ids: list[int], model: LoadedModel) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in model.stop_ids), ids)


def _draw(model: LoadedModel, logits: mx.array) -> mx.array:
    """One id a row: temperature, top-k, top-p of the model's defaults."""
    defaults = model.defaults
    n_kept = int(defaults.top_k)
    order = mx.argsort(-logits, axis=-1)[:, :n_kept]
    values = mx.take_along_axis(logits, order, axis=-1) / defaults.temperature
    shares = mx.softmax(values, axis=-1)
    values = mx.where(mx.cumsum(shares, axis=-1) - shares < defaults.top_p, values, -mx.inf)
    return mx.take_along_axis(order, mx.random.categorical(values)[:, None], axis=-1)[:, 0]
