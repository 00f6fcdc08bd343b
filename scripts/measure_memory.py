"""Planned against measured memory, and speed against the byte limit, on any backend.

    python scripts/measure_memory.py --model FOLDER            # a conversion or checkpoint
    python scripts/measure_memory.py --layers 64               # QwQ's shapes with random 4-bit weights, built in place

For every setting (context, KV bits, ids per pass) the cache is filled with random keys and values up to the last pass,
then that pass and some decode steps run: the peak of a run is there, so the whole prompt need not be fed (--whole does
it). Prints one JSON line per setting and, as the last line of stdout, everything; progress goes to stderr. A setting
that fails is reported with its error; one that would start after --budget seconds is left out by name.

Does not: judge; tests/model/test_memory.py holds the bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.bench.models import qwq_shaped, random_module
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.device import backend_name, limit_bytes
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import default_compute_type, load_model
from qwq_mlx.model.memory.plan import ModelShape, Workload, plan_memory
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.options import NEUTRAL, Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=0).resolve(NEUTRAL)


def _main() -> int:
    options = _parser().parse_args()
    started = time.perf_counter()
    _note(f"MLX {version('mlx')} on {mx.default_device()}, {limit_bytes() / 1e9:.1f} GB to use")
    module, shape = model_of(options, options.layers)
    mx.clear_cache()
    built_s = time.perf_counter() - started
    active = mx.get_active_memory()
    result: dict[str, Any] = {
        "backend": backend_name(),
        "device": {name: str(value) for name, value in mx.device_info().items()},
        "mlx": version("mlx"),
        "layers": shape.config.num_hidden_layers,
        "built_s": round(built_s, 1),
        "weights_bytes": active,
        "planned_weights_bytes": plan_memory(
            shape, Workload(compute_type=options.compute_type), backend=backend_name()
        ).weights_bytes,
        "settings": [],
        "left_out": [],
    }
    _note(f"built in {built_s:.1f} s: {active / 1e9:.2f} GB")
    if not options.no_rates:
        result["rates"] = rates(module, shape, options, active)
    settings = [(c, b, s) for b in options.kv_bits for c in options.contexts for s in options.prefill_steps]
    for context, kv_bits, step in settings:
        name = {"context": context, "kv_bits": kv_bits, "prefill_step": step}
        if time.perf_counter() - started > options.budget:
            result["left_out"].append(name)
            continue
        row = {**name, **attempt(peak, module, shape, context, kv_bits or None, step, options)}
        result["settings"].append(row)
        print(json.dumps(row), flush=True)
    ratios = [row["planned/measured"] for row in result["settings"] if "planned/measured" in row]
    result["planned/measured"] = [min(ratios), max(ratios)] if ratios else None
    result["wall_s"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a conversion or checkpoint, in place of the random model")
    add("--layers", type=int, default=64, help="of the random model (default: %(default)s)")
    add("--hidden", type=int, help="of the random model (default: QwQ's)")
    add("--intermediate", type=int, help="of the random model (default: QwQ's)")
    add("--heads", type=int, help="of the random model (default: QwQ's)")
    add("--kv-heads", type=int, help="of the random model (default: QwQ's)")
    add("--vocab", type=int, help="of the random model (default: QwQ's)")
    add("--contexts", type=int, nargs="+", default=[4096, 32_768], metavar="N", help="positions (default: 4096 32768)")
    add("--kv-bits", type=int, nargs="+", default=[0, 8, 4], choices=(0, 8, 4), help="0 is plain (default: 0 8 4)")
    add("--prefill-steps", type=int, nargs="+", default=[256, 2048], metavar="N", help="(default: 256 2048)")
    add("--tokens", type=int, default=8, help="decode steps in each setting (default: %(default)s)")
    add("--rate-tokens", type=int, default=64, help="decode steps where speed is measured (default: %(default)s)")
    add("--whole", action="store_true", help="feed the whole prompt instead of filling the cache")
    add("--no-rates", action="store_true", help="memory only")
    add(
        "--compute-type", choices=("float32", "bfloat16"), help="of the random model and its cache (default: backend's)"
    )
    add("--budget", type=float, default=80.0, metavar="S", help="start no setting after S seconds (default: 80)")
    return parser


def model_of(
    options: argparse.Namespace, n_layers: int, *, is_packed: bool = True, seed: int = 0
) -> tuple[Any, ModelShape]:
    """The model of --model, or a random one of so many of QwQ's layers with what the options change of its shape."""
    if options.model is not None:
        files = open_model_folder(options.model)
        return load_model(options.model).module, ModelShape(config=files.config, packed=files.packed)
    config, packed = qwq_shaped(n_layers)
    given = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocab,
    }
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    packed = packed if is_packed else {}
    compute_type = options.compute_type or default_compute_type()
    return random_module(config, packed, compute_type, seed=seed), ModelShape(config=config, packed=packed)


def peak(
    module: Any, shape: ModelShape, context: int, kv_bits: int | None, step: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Planned and measured bytes of one run that fills its context."""
    asked = Workload(context=context, kv_bits=kv_bits, prefill_step=step, compute_type=options.compute_type)
    plan = plan_memory(shape, asked, backend=backend_name())
    mx.clear_cache()
    cache = new_cache(module, kv_bits)
    n_prompt = context - options.tokens
    n_filled = 0 if options.whole else max(0, n_prompt - 1 - step)  # the last pass is a whole one
    fill(cache, shape, n_filled, options.compute_type)
    mx.clear_cache()
    mx.reset_peak_memory()
    decoder, row = Decoder(module, n_ids=shape.config.vocab_size), Row(_sampler(), cache=cache)
    row.max_tokens = options.tokens
    ids = _prompt(shape, n_prompt)
    start = time.perf_counter()
    for _ in decoder.prefill(row, ids, chunk=step, n_cached=n_filled):
        pass
    prefill_s = time.perf_counter() - start
    prefill_peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    for _ in range(options.tokens):
        decoder.draw(row)
    decode_peak = mx.get_peak_memory()
    measured = max(prefill_peak, decode_peak)
    kv_bytes = sum(layer.nbytes for layer in cache)
    base = plan.weights_bytes + plan.kv_bytes
    return {
        "planned/measured": round(plan.peak_bytes / measured, 4),
        "planned": {
            "peak": plan.peak_bytes,
            "kv": plan.kv_bytes,
            "prefill": plan.prefill_bytes,
            "decode": plan.decode_bytes + plan.logits_bytes + plan.sampler_bytes,
        },
        "measured": {"peak": measured, "kv": kv_bytes, "prefill": prefill_peak - base, "decode": decode_peak - base},
        "n_filled": n_filled,
        "last_passes_s": round(prefill_s, 3),
    }


def fill(cache: Sequence[Any], shape: ModelShape, n_ids: int, compute_type: str | None = None) -> None:
    """Random keys and values at n_ids positions, layer by layer, as a prefill in passes would have left them."""
    if n_ids == 0:
        return
    config = shape.config
    dims = (1, config.num_key_value_heads, n_ids, config.head_dim)
    dtype = getattr(mx, compute_type or default_compute_type())
    for layer in cache:
        layer.update_and_fetch(mx.random.normal(dims).astype(dtype), mx.random.normal(dims).astype(dtype))
        mx.eval(layer.state)


def rates(module: Any, shape: ModelShape, options: argparse.Namespace, active: int) -> dict[str, Any]:
    """Tokens per second of prefill and decode beside mlx-lm, and decode's share of what the bandwidth would allow."""
    bandwidth = copy_bandwidth()
    embedding = module.model.embed_tokens
    n_read = active - sum(value.nbytes for value in embedding.parameters().values())
    found: dict[str, Any] = {"copy_gb_s": round(bandwidth / 1e9, 1), "weights_read_gb": round(n_read / 1e9, 3)}
    for n_ids in (16, max(options.contexts) - options.rate_tokens - 1):
        for who, run, bits in (("qwq_mlx", _ours, None), ("mlx-lm", _theirs, None), *_quantized(options)):
            row = attempt(rate_of, run, module, shape, n_ids, options.rate_tokens, bits)
            if "tok_s" in row:
                asked = Workload(kv_bits=bits, compute_type=options.compute_type)
                per_token = plan_memory(shape, asked, backend=backend_name()).kv_bytes_per_token
                limit = bandwidth / (n_read + per_token * n_ids)
                row["share_of_byte_limit"] = round(row["tok_s"] / limit, 3)
            found[f"decode at {n_ids}, {who}"] = row
            _note(f"decode at {n_ids}, {who}: {row}")
    n_prompt = min(2048 if backend_name() != "cpu" else 64, max(options.contexts)) - 1
    for who, feed in (("qwq_mlx", _our_prefill), ("mlx-lm", _their_prefill)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            feed(module, shape, n_prompt)
            seconds.append(time.perf_counter() - start)
        found[f"prefill of {n_prompt}, {who}"] = {"tok_s": round(n_prompt / min(seconds), 1)}
        _note(f"prefill of {n_prompt}, {who}: {n_prompt / min(seconds):,.1f} tok/s")
    return found


def _quantized(options: argparse.Namespace) -> list[tuple[str, Any, int]]:
    """mlx-lm's own quantized cache is not timed: on CUDA its numbers are wrong (qwq_mlx/model/attention.py)."""
    return [(f"qwq_mlx with {bits} bits", _ours, bits) for bits in options.kv_bits if bits]


def copy_bandwidth() -> float:
    """Bytes read and written per second by adding to a large array, the median of 5."""
    n_bytes = (1 << 30) if backend_name() != "cpu" else (1 << 27)
    n_rounds, seconds = 8, []
    values = mx.zeros((n_bytes // 4,), mx.float32)
    mx.eval(values)
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(n_rounds):
            values = values + 1
        mx.eval(values)
        seconds.append(time.perf_counter() - start)
    return 2 * n_bytes * n_rounds / statistics.median(seconds[1:])


def _ours(module: Any, shape: ModelShape, n_ids: int, n_tokens: int, kv_bits: int | None = None) -> Iterator[object]:
    cache = new_cache(module, kv_bits)
    fill(cache, shape, n_ids)
    decoder, row = Decoder(module, n_ids=shape.config.vocab_size), Row(_sampler(), cache=cache, max_tokens=n_tokens)
    for _ in decoder.prefill(row, _prompt(shape, n_ids + 2), chunk=2048, n_cached=n_ids):
        pass
    for _ in range(n_tokens):
        yield decoder.draw(row)


def _theirs(module: Any, shape: ModelShape, n_ids: int, n_tokens: int, kv_bits: int | None = None) -> Iterator[object]:
    cache = new_cache(module, kv_bits)
    fill(cache, shape, n_ids)
    step = import_mlx_lm("mlx_lm.generate").generate_step
    made = import_mlx_lm("mlx_lm.sample_utils").make_sampler(
        temp=SAMPLING.temperature, top_p=SAMPLING.top_p, top_k=SAMPLING.top_k
    )
    yield from step(mx.array(_prompt(shape, 2)), module, max_tokens=n_tokens, sampler=made, prompt_cache=cache)


def _our_prefill(module: Any, shape: ModelShape, n_ids: int) -> None:
    decoder = Decoder(module, n_ids=shape.config.vocab_size)
    row = Row(_sampler(), cache=new_cache(module), max_tokens=1)
    for _ in decoder.prefill(row, _prompt(shape, n_ids), chunk=2048):
        pass
    decoder.draw(row)


def _their_prefill(module: Any, shape: ModelShape, n_ids: int) -> None:
    step = import_mlx_lm("mlx_lm.generate").generate_step
    for _ in step(mx.array(_prompt(shape, n_ids)), module, max_tokens=1, prefill_step_size=2048):
        pass


def decode_tok_s(tokens: Iterator[object]) -> float:
    """From the first token on, so prefill and compilation are outside."""
    next(tokens)
    start = time.perf_counter()
    n_tokens = sum(1 for _ in tokens)
    return round(n_tokens / (time.perf_counter() - start), 2)


def rate_of(run: Any, *arguments: Any) -> dict[str, Any]:
    """The rate of a run, as a row."""
    return {"tok_s": decode_tok_s(run(*arguments))}


def attempt(measure: Any, *arguments: Any) -> dict[str, Any]:
    """What was measured, or the error in words: one setting that a backend cannot run must not cost the others."""
    try:
        return dict(measure(*arguments))
    except (RuntimeError, ValueError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _sampler() -> Sampler:
    return Sampler(SAMPLING, seed=0)


def _prompt(shape: ModelShape, n_ids: int) -> list[int]:
    return [(7 * place) % min(shape.config.vocab_size, 256) for place in range(n_ids)]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(_main())
