"""Ask one loaded model the same question many times and look for anything that grows.

    python scripts/repeat_request.py MODEL [--requests 1000] [--tokens 8] [--inspect]

After each tenth of the requests: MLX's active memory, the mx.arrays that Python holds, and the process's resident
memory. Prints one JSON object with the values and the slopes per request over the second half; exit code 1 where active
memory or live arrays grow at all, or resident memory by more than 1 KiB a request.

Does not: prove anything about device memory that MLX does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.generate.reasoner import load
from qwq_mlx.options import Inspect, Limits, Sampling


def _resident_bytes() -> int:
    """On Linux; elsewhere 0, which has no slope."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def _slope(values: list[int], step: int) -> float:
    """Per request, from the middle to the end: the first half fills caches."""
    half = values[len(values) // 2 :]
    return (half[-1] - half[0]) / (step * (len(half) - 1))


def main() -> int:
    """Repeat, measure, print."""
    parser = argparse.ArgumentParser(description="Repeat one request and look for anything that grows.")
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--inspect", action="store_true", help="with alternatives, hidden states and loop scores")
    options = parser.parse_args()
    reasoner = load(options.model)
    inspect = Inspect(top_k=4, hidden_layers=(0, 1), loop_scores=True) if options.inspect else None
    step = max(1, options.requests // 10)
    active, arrays, resident, texts = [], [], [], set()
    for number in range(1, options.requests + 1):
        trace = reasoner.generate(
            "How many r in strawberry?",
            sampling=Sampling(temperature=1.0, seed=7),
            limits=Limits(max_tokens=options.tokens),
            inspect=inspect,
        )
        texts.add(trace.ids)
        del trace
        if number % step == 0:
            gc.collect()
            active.append(mx.get_active_memory())
            arrays.append(sum(type(each) is mx.array for each in gc.get_objects()))
            resident.append(_resident_bytes())
    result = {
        "requests": options.requests,
        "tokens": options.tokens,
        "distinct_outputs": len(texts),
        "active_bytes": active,
        "live_arrays": arrays,
        "resident_bytes": resident,
        "active_slope_bytes": _slope(active, step),
        "arrays_slope": _slope(arrays, step),
        "resident_slope_bytes": round(_slope(resident, step), 1),
    }
    print(json.dumps(result))
    grows = result["active_slope_bytes"] > 0 or result["arrays_slope"] > 0 or result["resident_slope_bytes"] > 1024
    return 1 if grows or len(texts) != 1 else 0


if __name__ == "__main__":
    sys.exit(main())
