"""What a pass of several rows costs, ours beside mlx-lm's batch, and whether a row draws what it draws alone.

    python scripts/measure_rows.py [--layers 64] [--rows 1 2 4 8 16 32] [--tokens 48]

QwQ-32B's shape with random 4-bit weights. For each number of rows: the median of a step in ms, tokens a second of all
rows, and for the first four rows the first token that differs from the same row alone (the number of tokens: none). In
random weights many ids are nearly equal, so a difference there says that the backend computes rows otherwise, not that
a text would differ as early. mlx-lm runs on the same weights and prompt in the same process. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx

from qwq_mlx.bench.models import qwq_shaped, random_module
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import NEUTRAL, Sampling

_SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20).resolve(NEUTRAL)
_PROMPT = [(7 * place) % 256 for place in range(64)]
_WARM_UP = 8  # steps that are not counted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    config, packed = qwq_shaped(options.layers)
    module = random_module(config, packed, default_compute_type(), seed=0)
    alone = [_ours(module, config.vocab_size, [seed], options.tokens)[0][0] for seed in range(4)]
    result: dict[str, Any] = {"layers": options.layers, "tokens": options.tokens, "rows": {}}
    result["device"] = str(mx.device_info().get("device_name") or mx.default_device())
    for n_rows in options.rows:
        ids, seconds = _ours(module, config.vocab_size, range(n_rows), options.tokens)
        theirs = _theirs(module, n_rows, options.tokens)
        result["rows"][n_rows] = {
            "ms": round(1e3 * seconds, 2),
            "tok_s": round(n_rows / seconds, 1),
            "mlx_lm_ms": round(1e3 * theirs, 2),
            "mlx_lm_tok_s": round(n_rows / theirs, 1),
            "first_difference": [_first_difference(*pair) for pair in zip(ids, alone, strict=False)],
        }
        sys.stderr.write(f"{n_rows} rows: {result['rows'][n_rows]}\n")
    print(json.dumps(result))


def _ours(module: Any, n_ids: int, seeds: Any, n_tokens: int) -> tuple[list[list[int]], float]:
    """The ids of a row for each seed, and the median seconds of a step."""
    decoder = Decoder(module, n_ids=n_ids)
    rows = [Row(Sampler(_SAMPLING, seed=seed), cache=new_cache(module), max_tokens=n_tokens) for seed in seeds]
    for row in rows:
        for _ in decoder.prefill(row, _PROMPT, chunk=2048):
            pass
    ids: list[list[int]] = [[] for _ in rows]
    times = []
    for _ in range(n_tokens):
        start = time.perf_counter()
        for drawn, token in zip(ids, decoder.step(rows), strict=True):
            drawn.append(token.id)
        times.append(time.perf_counter() - start)
    return ids, statistics.median(times[_WARM_UP:-1])


def _theirs(module: Any, n_rows: int, n_tokens: int) -> float:
    """The median seconds of a step of mlx-lm's batch."""
    make = import_mlx_lm("mlx_lm.sample_utils").make_sampler
    sampler = make(temp=_SAMPLING.temperature, top_p=_SAMPLING.top_p, top_k=_SAMPLING.top_k)
    generator = import_mlx_lm("mlx_lm.generate").BatchGenerator(module, sampler=sampler)
    generator.insert([_PROMPT] * n_rows, [n_tokens] * n_rows)
    times = []
    start = time.perf_counter()
    while generator.next_generated():
        now = time.perf_counter()
        times.append(now - start)
        start = now
    generator.close()
    return statistics.median(times[_WARM_UP:-1])


def _first_difference(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    main()
