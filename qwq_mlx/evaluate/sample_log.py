"""The samples of an evaluation in lm-eval's JSON lines, so that its viewers and scripts read them.

One file a model, one line a sample, with the fields of lm-eval 0.4.13's sample logs: doc, target, arguments, resps,
filtered_resps, the hashes, and as metrics `exact_match` (our verdict) and, where there is one, `math_verify`. A problem
with several samples has several lines of one doc_id.

Does not: run lm-eval (`lm_eval` does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SavingError, system_said
from qwq_mlx.evaluate.answering import question_text
from qwq_mlx.evaluate.folder import Evaluation
from qwq_mlx.evaluate.rows import Row
from qwq_mlx.files.atomic import write_file
from qwq_mlx.generate.question_file.results import read_traces

__all__ = ["write_sample_log"]


def write_sample_log(evaluation: Evaluation, label: str, rows: Sequence[Row]) -> Path:
    """Write `LABEL.lm_eval.jsonl` into the evaluation's folder; the file appears whole or not at all.

    Raises SavingError where the disk does not take it.
    """
    path = evaluation.folder / f"{label}.lm_eval.jsonl"
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(evaluation, label, rows))
    try:
        write_file(path, "".join(lines).encode())
    except OSError as error:
        raise SavingError(f"{path}: cannot be written {system_said(error, 'Make room.')}", error) from error
    return path


def _lines(evaluation: Evaluation, label: str, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row, (line, trace) in zip(rows, read_traces(evaluation.traces(label)), strict=False):
        problem = evaluation.problem_of(line["index"])
        prompt, doc = question_text(evaluation, problem.question), asdict(problem)
        metrics = {"exact_match": float(row.is_right)}
        if row.math_verify is not None:
            metrics["math_verify"] = float(row.math_verify)
        sampling = row.settings["sampling"]
        settings = {
            "until": [],
            "do_sample": sampling["temperature"] != 0,
            "max_gen_toks": row.settings["limits"]["max_tokens"],
            **{name: sampling[name] for name in ("temperature", "top_p", "top_k", "min_p")},
        }
        yield {
            "doc_id": line["index"] % len(evaluation.problems),
            "doc": doc,
            "target": problem.expected,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": settings}},
            "resps": [["" if trace is None else trace.text]],
            "filtered_resps": [row.answer or ""],
            "filter": "qwq_mlx",
            "metrics": list(metrics),
            "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _sha256(prompt),
            "target_hash": _sha256(problem.expected),
            **metrics,
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
