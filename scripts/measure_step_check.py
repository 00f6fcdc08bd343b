"""Measure what a decode step pays for its check for NaN and infinity, and for the entropy that the check rides on.

    python scripts/measure_step_check.py [--model DIR] [--rounds 60] [--steps 40]

For the model (default: the pocket) and for QwQ-32B's shape with random 4-bit weights: whole steps of the `Decoder`, and
what follows the last product as `generate.decode` has it: the draw and the log-probability alone, with the check of a
run without entropy (`Inspect(entropy=False)`), and with the entropy. These three take turns, many to one wait, because
a step's own spread is far above their differences. QwQ's shape is run with 1 and with 2 layers; 64 are extrapolated.
Prints one JSON object a model: medians in microseconds, and what check and entropy add as shares of a whole step.

Does not: load the 32B; on Metal it was not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.bench.models import qwq_shaped, random_module
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.model.load import default_compute_type, load_model
from qwq_mlx.options import NEUTRAL, Sampling

_SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20)  # QwQ-32B-Preview's own
_QWQ_IDS = 151_665
_AT_ONCE = 16  # ends to one wait, which costs more than the smaller of them

_SECONDS: dict[str, Callable[[Any, Any], Any | None]] = {
    "without": lambda logits, total: None,
    "check": lambda logits, total: logits.sum(),
    "entropy": lambda logits, total: total - (mx.exp(logits - total) * logits).sum(),
}
"""What follows the log-probability, as `generate.decode` works it out."""


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=pocket_checkpoint(), help="a checkpoint or conversion (default: the pocket)"
    )
    parser.add_argument("--rounds", type=int, default=60, help="of the ends (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="whole steps, an eighth for QwQ (default: %(default)s)")
    options = parser.parse_args()
    model = load_model(options.model)
    n_ids = model.tokenizer.n_ids
    _report(options.model.name, n_ids, _step_us(model.module, n_ids, options.steps), options.rounds)
    del model
    few = []
    for n_layers in (1, 2):
        config, packed = qwq_shaped(n_layers)
        module = random_module(config, packed, default_compute_type(), seed=0)
        few.append(_step_us(module, _QWQ_IDS, max(2, options.steps // 8)))
        del module
    layers = QWQ_32B_PREVIEW.num_hidden_layers
    _report(f"QwQ-32B's shape, {layers} layers from 1 and 2", _QWQ_IDS, few[0] + (layers - 1) * (few[1] - few[0]), 60)


def _step_us(module: Any, n_ids: int, n_steps: int) -> float:
    """The median of whole steps, entropy and all."""
    decoder = Decoder(module, n_ids=n_ids)
    row = Row(Sampler(_SAMPLING.resolve(NEUTRAL), seed=0), cache=new_cache(module))
    for _ in decoder.prefill(row, [1, 2, 3], chunk=3):
        pass
    for _ in range(2):
        decoder.draw(row)
    times = []
    for _ in range(n_steps):
        start = time.perf_counter()
        decoder.draw(row)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _report(name: str, n_ids: int, step_us: float, rounds: int) -> None:
    sys.stderr.write(f"{name}: {step_us:,.0f} us a step; now its end\n")
    sampler = Sampler(_SAMPLING.resolve(NEUTRAL), seed=0)
    names = list(_SECONDS)
    times: dict[str, list[float]] = {each: [] for each in names}
    for at in range(rounds + 3):
        logits = mx.random.normal((_AT_ONCE, n_ids), key=mx.random.key(at)) * 3
        mx.eval(logits)
        for each in names[at % 3 :] + names[: at % 3]:  # each comes first as often as the others
            start = time.perf_counter()
            mx.eval([_end(logits[row], _SECONDS[each], sampler, row) for row in range(_AT_ONCE)])
            if at >= 3:
                times[each].append((time.perf_counter() - start) / _AT_ONCE * 1e6)
    paired = list(zip(*times.values(), strict=True))
    added = {
        each: statistics.median(took[place] - took[0] for took in paired)
        for place, each in enumerate(names)
        if each != "without"
    }
    result = {
        "model": name,
        "ids": n_ids,
        "backend": str(mx.default_device()),
        "step_us": round(step_us, 1),
        "end_us": {each: round(statistics.median(took), 1) for each, took in times.items()},
        "added_us": {each: round(value, 1) for each, value in added.items()},
        "added_share": {each: round(value / step_us, 6) for each, value in added.items()},
    }
    print(json.dumps(result), flush=True)


def _end(logits: Any, second: Callable[[Any, Any], Any | None], sampler: Sampler, at: int) -> list[Any]:
    """The end of a step, as `decode` builds it: an id, its log-probability, and perhaps one number more."""
    drawn = sampler.draw(logits, at)
    total = mx.logsumexp(logits)
    more = second(logits, total)
    return [drawn, mx.stack([logits[drawn] - total] + ([] if more is None else [more]))]


if __name__ == "__main__":
    main()
