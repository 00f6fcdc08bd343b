"""One model in N processes beside one process, and beside mlx-lm's own sharding, in the same run.

    python scripts/measure_ranks.py --model DIR [--hosts 'localhost*2'] [--backend nccl] [--prompt 4096] [--tokens 128]
        [--batches 1 8 32]

On two GPUs of one host --backend nccl gives each process one of them. For each of the three: bytes in memory (of every
process, beside the plan), prefill and decode in tokens a second, and batches; and whether the ids are those of one
process. Prints one JSON line. mlx-lm's rows are greedy steps of its
model and its caches, all of one length.

Does not: run on several machines (mlx-lm's part is started here alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.cli.host_check import checked_hosts
from qwq_mlx.cli.hosts import Hosts, parse_hosts
from qwq_mlx.cli.launch import Launch
from qwq_mlx.cli.rank import RANK_VARIABLE, joined_group

_GREEDY_IDS = 24
_MEASURED = "QWQ_MLX_MEASURED"  # the file for what rank 0 measured


def main() -> int:
    """Measure all three, or as one of the processes its part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--hosts", default="localhost*2")
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring")
    parser.add_argument("--prompt", type=int, default=4096, help="words of the long prompt")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--part", choices=("ours", "mlx-lm"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        measured = _ours(options) if options.part == "ours" else _mlx_lm(options)
        Path(os.environ[_MEASURED]).write_text(json.dumps(measured))
        return 0
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{Path(__file__).parent.parent}"
    hosts = checked_hosts(parse_hosts(options.hosts, backend=options.backend), [options.model], port=None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_MEASURED] = str(Path(folder) / "measured.json")
        alone = _alone(options)
        together, peaks = _together(options, hosts)
        theirs = _theirs(options, hosts)
    report = {
        "backend": options.backend,
        "processes": len(hosts.ranks),
        "one process": alone,
        "together": {**together, "peak_bytes_of_each": peaks},
        "mlx-lm, sharded": theirs,
        "same ids": alone.pop("ids") == together.pop("ids"),
    }
    print(json.dumps(report, indent=1))
    return 0


def _arguments(options: Any, part: str) -> list[str]:
    batches = [str(n) for n in options.batches]
    numbers = ["--prompt", str(options.prompt), "--tokens", str(options.tokens), "--batches", *batches]
    return ["--model", str(options.model), *numbers, "--part", part]


def _measured() -> dict[str, Any]:
    return dict(json.loads(Path(os.environ[_MEASURED]).read_text()))


def _alone(options: Any) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    command = [sys.executable, "-m", "measure_ranks", *_arguments(options, "ours")]
    subprocess.run(command, env=environment, check=True)
    return _measured()


def _together(options: Any, hosts: Hosts) -> tuple[dict[str, Any], list[int]]:
    launch = Launch("measure_ranks", _arguments(options, "ours"), hosts)
    try:
        if launch.work():
            raise SystemExit("the processes failed")
        signs = [launch.sign(rank) for rank in range(len(hosts.ranks))]
    finally:
        launch.close()
    return _measured(), [int(sign.get("peak_bytes", 0)) for sign in signs]


def _theirs(options: Any, hosts: Hosts) -> dict[str, Any]:
    """mlx-lm's model, sharded by mlx-lm; every rank runs the same program."""
    with Path(os.devnull).open("wb") as nowhere:
        processes = []
        for rank in range(len(hosts.ranks)):
            setup = hosts.setup(rank, signs=nowhere.fileno(), snapshots="")
            environment = {**os.environ, **setup.environment, RANK_VARIABLE: setup.to_json()}
            if rank:
                environment[_MEASURED] = os.devnull
            command = [sys.executable, "-m", "measure_ranks", *_arguments(options, "mlx-lm")]
            processes.append(subprocess.Popen(command, env=environment, pass_fds=[nowhere.fileno()]))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("mlx-lm's processes failed")
    return _measured()


def _ours(options: Any) -> dict[str, Any]:
    import mlx.core as mx

    from qwq_mlx import Limits, Sampling, load

    reasoner = load(options.model, group=joined_group(), verify=False)
    greedy, cut = Sampling(temperature=0.0), Limits(max_tokens=options.tokens)
    ids = reasoner.generate("Count.", sampling=greedy, limits=Limits(max_tokens=_GREEDY_IDS)).ids  # and it warms up
    long = reasoner.stream("word " * options.prompt, sampling=greedy, limits=cut)
    plan = long.request.plan
    timings = [long.trace() for _ in long][-1].timings
    rates = {}
    for n in options.batches:
        started = time.perf_counter()
        traces = reasoner.batch_generate(["Count to 100."] * n, sampling=greedy, limits=cut, width=n)
        rates[str(n)] = sum(len(trace.ids) for trace in traces) / (time.perf_counter() - started)
    return {
        "ids": list(ids),
        "prefill": len(long.request.prompt_ids) / timings.prefill_s,
        "decode": (len(long.run.steps) - 1) / timings.decode_s,
        "batches": rates,
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
        "planned_weights_bytes": plan.weights_bytes,
        "planned_peak_bytes": plan.peak_bytes,
    }


def _mlx_lm(options: Any) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    group = joined_group()
    model, _ = load_model(options.model, lazy=True)
    model.shard(group)
    mx.eval(model.parameters())

    def run(n_rows: int, n_prompt: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the tokens behind it."""
        cache, ids = make_prompt_cache(model), mx.full((n_rows, n_prompt), 11, mx.int32)
        started = time.perf_counter()
        for first in range(0, n_prompt, 512):
            logits = model(ids[:, first : first + 512], cache=cache)
            mx.eval([each.state for each in cache])
        drawn = mx.argmax(logits[:, -1:], axis=-1)
        mx.eval(drawn)
        prompted = time.perf_counter()
        for _ in range(options.tokens):
            drawn = mx.argmax(model(drawn, cache=cache)[:, -1:], axis=-1)
            mx.eval(drawn)
        return prompted - started, time.perf_counter() - prompted

    run(1, 8)
    prefill_s, decode_s = run(1, options.prompt)
    rates = {str(n): n * options.tokens / run(n, 16)[1] for n in options.batches}
    return {
        "prefill": options.prompt / prefill_s,
        "decode": options.tokens / decode_s,
        "batches": rates,
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
    }


if __name__ == "__main__":
    sys.exit(main())
