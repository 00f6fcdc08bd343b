"""What a quantized KV cache costs in quality: a plain one against 8 and 4 bits, on the same ids.

    python scripts/measure_kv_bits.py --model FOLDER [--traces N] [--tokens N] [--problems N]

1. The model answers N held-out problems greedily with a plain cache; that text is then fed, pass by pass, through each
   cache. Told: the mean KL divergence of the next-id distribution from the plain cache's, in nats, and how often the
   likeliest id is the same.
2. How many of N held-out problems are solved with each cache.

One JSON line on stdout. Does not: say that more bits are needed elsewhere; a small model's cache is not a big one's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from pocket import data

from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.pocket.problems import Problem, is_solved
from qwq_mlx.trace.trace import Trace

GREEDY = Sampling(temperature=0.0, seed=0)
BITS: tuple[Literal[8, 4], ...] = (8, 4)
_STEP = 64


def main() -> int:
    """Run the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=400, help="of each trace at most (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=12)
    options = parser.parse_args()
    reasoner = load(options.model)
    asked = _problems(options.problems)
    plain = [_answered(reasoner, problem, options.tokens, None) for problem in asked]
    ids = [[*trace.prompt_ids, *trace.ids] for trace in plain[: options.traces]]
    result: dict[str, Any] = {"model": options.model.name, "solved, plain": _score(asked, plain)}
    for bits in BITS:
        result[f"{bits} bits"] = _compared(reasoner, ids, bits)
        traces = [_answered(reasoner, problem, options.tokens, bits) for problem in asked]
        result[f"solved, {bits} bits"] = _score(asked, traces)
        sys.stderr.write(f"{result}\n")
    print(json.dumps(result))
    return 0


def _problems(n: int) -> list[Problem]:
    """Held-out problems, the kinds in turn."""
    kinds = [data.held_out_problems(kind, (n + 2) // 3, seed=3) for kind in ("letters", "arithmetic", "parentheses")]
    return [problem for row in zip(*kinds, strict=True) for problem in row][:n]


def _answered(reasoner: Reasoner, problem: Problem, n_tokens: int, bits: Literal[8, 4] | None) -> Trace:
    return reasoner.generate(problem.question, sampling=GREEDY, limits=Limits(max_tokens=n_tokens, kv_bits=bits))


def _score(asked: Sequence[Problem], traces: Sequence[Trace]) -> str:
    n_solved = sum(is_solved(problem, trace.answer) for problem, trace in zip(asked, traces, strict=True))
    return f"{n_solved} of {len(asked)}"


def _compared(reasoner: Reasoner, texts: Sequence[Sequence[int]], bits: int) -> dict[str, Any]:
    """KL of each next-id distribution from the plain cache's, and agreement of the likeliest id."""
    divergences: list[float] = []
    n_same = 0
    for ids in texts:
        plain, quantized = (_log_probabilities(reasoner, ids, each) for each in (None, bits))
        divergences += (mx.exp(plain) * (plain - quantized)).sum(axis=-1).tolist()
        n_same += int((plain.argmax(axis=-1) == quantized.argmax(axis=-1)).sum().item())
    return {
        "places": len(divergences),
        "mean_kl_nats": round(sum(divergences) / len(divergences), 6),
        "max_kl_nats": round(max(divergences), 4),
        "same_top_1": round(n_same / len(divergences), 5),
    }


def _log_probabilities(reasoner: Reasoner, ids: Sequence[int], bits: int | None) -> mx.array:
    """(n, vocab) float32, after each id, fed in passes as a prefill does."""
    module, cache = reasoner.model.module, new_cache(reasoner.model.module, bits)
    rows = []
    for start in range(0, len(ids), _STEP):
        logits = module(mx.array([list(ids[start : start + _STEP])]), cache=cache)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


if __name__ == "__main__":
    sys.exit(main())
