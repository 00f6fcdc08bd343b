"""What a pass of several rows costs, ours beside mlx-lm's batch, and whether a row draws what it draws alone.

    python scripts/measure_rows.py [--layers 64 | --model FOLDER] [--rows 1 2 4 8 16 32] [--tokens 48]

QwQ-32B's shape with random 4-bit weights. For each number of rows: the median of a step in ms, tokens a second of all
rows, and for the first four rows the first token that differs from the same row alone (the number of tokens: none). In
random weights many ids are nearly equal, so a difference there says that the backend computes rows otherwise, not that
a text would differ as early. mlx-lm runs on the same weights and prompt in the same process. One JSON line on stdout.

With a model's folder a question is asked of it, and how late a text differs is measured, without mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx

from qwq_mlx.bench.decode import QUESTION
from qwq_mlx.bench.loops import our_passes, prompt_of, their_passes
from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.model.load import default_compute_type, load_model
from qwq_mlx.model.prompt import prompt_ids

_N_PROMPT = 64
_N_COMPARED = 4  # rows that are also run alone
_WARM_UP = 8  # steps that are not counted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model in place of random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    n_passes, theirs = options.tokens, None
    result: dict[str, Any] = {"tokens": n_passes, "rows": {}}
    if options.model is None:
        config, packed = qwq_shaped(options.layers)
        module = random_module(config, packed, default_compute_type(), seed=0)
        theirs = in_compute_type(module, config, packed, default_compute_type())
        prompt, n_ids = prompt_of(_N_PROMPT, config.vocab_size), config.vocab_size
        result["layers"] = options.layers
    else:
        model = load_model(options.model)
        module, n_ids = model.module, model.tokenizer.n_ids
        prompt = prompt_ids(model.tokenizer, QUESTION, context=model.config.max_position_embeddings)
        result["model"] = model.name
    alone = [our_passes(module, prompt, n_ids, n_passes, seeds=[seed])[0][0] for seed in range(_N_COMPARED)]
    result["device"] = str(mx.device_info().get("device_name") or mx.default_device())
    for n_rows in options.rows:
        ids, passes = our_passes(module, prompt, n_ids, n_passes, seeds=range(n_rows))
        speed = _speed("", _median(passes), n_rows)
        if theirs is not None:
            speed |= _speed("mlx_lm_", _median(their_passes(theirs, prompt, n_passes, n_rows)), n_rows)
        result["rows"][n_rows] = {
            **speed,
            "first_difference": [_first_difference(*pair) for pair in zip(ids, alone, strict=False)],
        }
        sys.stderr.write(f"{n_rows} rows: {result['rows'][n_rows]}\n")
    print(json.dumps(result))


def _speed(whose: str, seconds: float, n_rows: int) -> dict[str, float]:
    return {f"{whose}ms": round(1e3 * seconds, 2), f"{whose}tok_s": round(n_rows / seconds, 1)}


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds[_WARM_UP:-1])


def _first_difference(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    main()
