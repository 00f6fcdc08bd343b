"""Planned against measured memory of rows that share their passes, and of mlx-lm with a draft model.

    python scripts/measure_batch_memory.py                  # a random model of QwQ's proportions, small
    python scripts/measure_batch_memory.py --model FOLDER   # a conversion or checkpoint
    python scripts/measure_batch_memory.py --shared --drafts --kv-bits 0 8 --heads 2   # one prompt for all, held once

Rows come when others are about to end, which is what is planned: the last one reads a whole pass of its prompt, up to
the end of the context, while the caches of the others are full. Rows behind one prompt begin together. In the end all
but 7 have gone, as samples end at different times, and on the CPU so few attend otherwise. A draft model of half the
layers goes through mlx_lm's speculative_generate_step; random models never agree, which is when a cache is rewound
most.

Prints one JSON line per setting and, as the last line of stdout, the range of all; exit code 1 where a plan is below
what was held by more than 2 %. On a GPU mlx-lm queues passes and holds what they need; --limited bounds that.

Does not: measure speed (`measure_rows` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure_memory import fill, model_of

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import forked_cache, new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.memory.plan import MemoryPlan, ModelShape, Workload, plan_memory
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import NEUTRAL, Sampling

_SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20).resolve(NEUTRAL)


def _main() -> int:
    options = _parser().parse_args()
    module, shape = _model(options, options.layers)
    rows = []
    for row in _rows(module, shape, options):
        rows.append(row)
        print(json.dumps(row), flush=True)
    ratios = [row["planned/measured"] for row in rows]
    print(
        json.dumps({"backend": backend_name(), "settings": len(rows), "planned/measured": [min(ratios), max(ratios)]})
    )
    return int(min(ratios) < 0.98)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a conversion or checkpoint, in place of the random model")
    add("--layers", type=int, default=4, help="of the random model (default: %(default)s)")
    add("--hidden", type=int, default=256, help="of the random model (default: %(default)s)")
    add("--intermediate", type=int, default=1024, help="of the random model (default: %(default)s)")
    add("--heads", type=int, default=4, help="of the random model (default: %(default)s)")
    add("--kv-heads", type=int, default=1, help="of the random model (default: %(default)s)")
    add("--vocab", type=int, default=512, help="of the random model (default: %(default)s)")
    add("--packed", action="store_true", help="4-bit weights in the random model; slow on the CPU")
    add("--samples", type=int, nargs="*", default=[2, 4, 8], metavar="K", help="rows (default: 2 4 8)")
    add("--kv-bits", type=int, nargs="+", default=[0], help="of the rows' cache, 0 for the compute type (default: 0)")
    add("--drafts", type=int, nargs="*", default=[2, 5], metavar="N", help="ids guessed at a time (default: 2 5)")
    add("--shared", action="store_true", help="rows that have all but the last id of their prompt in common")
    add("--contexts", type=int, nargs="+", default=[700, 1800], metavar="N", help="positions (default: 700 1800)")
    add("--prefill-steps", type=int, nargs="+", default=[64, 512], metavar="N", help="(default: 64 512)")
    add("--tokens", type=int, default=40, help="output of each sequence (default: %(default)s)")
    add("--limited", action="store_true", help="with MLX's memory limit at the plan, so that no more passes are queued")
    add("--compute-type", choices=("float32", "bfloat16"), help="of the random model (default: the backend's)")
    return parser


def _model(options: argparse.Namespace, n_layers: int) -> tuple[Any, ModelShape]:
    return model_of(options, n_layers, is_packed=options.packed, seed=n_layers)


def _rows(module: Any, shape: ModelShape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for context in options.contexts:
        for step in options.prefill_steps:
            n_prompt = 1 + (context - options.tokens - 1) // step * step  # of which the last id is fed by itself
            asked = Workload(context=n_prompt + options.tokens, prefill_step=step, compute_type=options.compute_type)
            for n_sequences in options.samples:
                for kv_bits in options.kv_bits:
                    n_shared = n_prompt - 1 if options.shared else 0
                    workload = replace(asked, n_sequences=n_sequences, kv_bits=kv_bits or None, n_shared=n_shared)
                    workload = workload if n_shared else replace(workload, context=context)
                    plan = plan_memory(shape, workload, backend=backend_name())
                    held = _held(None, _together, module, shape, workload, options.tokens)
                    yield _row({"samples": n_sequences, "kv_bits": kv_bits}, plan, held)
            for n_draft in options.drafts:
                draft, draft_shape = _model(options, max(1, options.layers // 2))
                workload = replace(asked, draft=draft_shape, n_draft=n_draft)
                plan = plan_memory(shape, workload, backend=backend_name())
                limit = plan.peak_bytes if options.limited else None
                held = _held(limit, _speculative, module, draft, workload, options.tokens)
                del draft
                yield _row({"draft": n_draft}, plan, held)


def _row(name: dict[str, Any], plan: MemoryPlan, held: int) -> dict[str, Any]:
    return {
        **name,
        "context": plan.context,
        "prefill_step": plan.workload.prefill_step,
        "planned/measured": round(plan.peak_bytes / held, 4),
        "planned": plan.peak_bytes,
        "measured": held,
        "beside weights": round((plan.peak_bytes - plan.weights_bytes) / (held - plan.weights_bytes), 3),
        "weights": plan.weights_bytes,
        "kv": plan.kv_bytes,
    }


def _held(limit_bytes: int | None, run: Callable[..., None], *arguments: Any) -> int:
    """The most bytes that MLX held at any time of a run, everything counted that was there before.

    limit_bytes: where MLX waits for what is queued before it takes more; None leaves its own.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    old = None if limit_bytes is None else mx.set_memory_limit(limit_bytes)
    run(*arguments)
    if old is not None:
        mx.set_memory_limit(old)
    return int(mx.get_peak_memory())


def _together(module: Any, shape: ModelShape, workload: Workload, n_tokens: int) -> None:
    decoder = Decoder(module, n_ids=shape.config.vocab_size)
    rows = [
        Row(Sampler(_SAMPLING, seed=seed), cache=new_cache(module, workload.kv_bits), max_tokens=n_tokens)
        for seed in range(workload.n_sequences)
    ]
    if workload.n_shared:
        rows = _forks(module, rows, decoder, workload, n_tokens)
        for _ in range(n_tokens // 2):
            decoder.step(rows)
    else:
        _come_one_after_another(rows, decoder, shape, workload, n_tokens)
    del rows[MIN_BLAS_ROWS - 1 :]
    for _ in range(n_tokens - n_tokens // 2 if workload.n_shared else 1):
        decoder.step(rows)


def _come_one_after_another(
    rows: list[Row], decoder: Decoder, shape: ModelShape, workload: Workload, n_tokens: int
) -> None:
    """All rows but the last decode to the end of their context but one, the last begins there, as behind a cache that
    was kept."""
    context, step, (*others, newcomer) = workload.context or 0, workload.prefill_step, rows
    for row in others:
        for _ in decoder.prefill(row, _prompt(context - n_tokens), chunk=step):
            pass
    for _ in range(n_tokens - 2):
        decoder.step(others)
    n_cached = max(0, context - 2 - step)
    fill(newcomer.cache, shape, n_cached, workload.compute_type)
    newcomer.max_tokens = 2
    for _ in decoder.prefill(newcomer, _prompt(context - 1), chunk=step, n_cached=n_cached):
        pass
    decoder.step(rows)


def _forks(module: Any, rows: list[Row], decoder: Decoder, workload: Workload, n_tokens: int) -> list[Row]:
    """The rows behind one prompt, which is read once."""
    prompt, first = _prompt((workload.context or 0) - n_tokens), Row(rows[0].sampler, cache=rows[0].cache)
    for _ in decoder.prefill(first, prompt, chunk=workload.prefill_step):
        pass
    for row in rows:
        row.cache = forked_cache(module, first.cache, workload.n_shared, workload.kv_bits)
        row.start(prompt)
    return rows


def _speculative(module: Any, draft: Any, workload: Workload, n_tokens: int) -> None:
    steps = import_mlx_lm("mlx_lm.generate").speculative_generate_step(
        mx.array(_prompt((workload.context or 0) - n_tokens)),
        module,
        draft,
        num_draft_tokens=workload.n_draft,
        max_tokens=n_tokens,
        prefill_step_size=workload.prefill_step,
    )
    assert sum(1 for _ in steps) == n_tokens


def _prompt(n_ids: int) -> list[int]:
    return [(7 * place) % 251 for place in range(n_ids)]


if __name__ == "__main__":
    sys.exit(_main())
