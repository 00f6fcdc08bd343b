"""What a rank of a split model holds while it reads its part, beside its plan, and how many bytes it reads.

    python scripts/measure_rank_load.py MODEL [--ranks N]

Each rank of a tensor and of a pipeline split (as for machines that are alike) reads its part in a process of its own;
reading needs no other rank. The peak is of the process's resident memory (VmHWM), above what it was before a weight was
read; the plan is weights and what stands beside them while they are read. Linux alone.

A table in Markdown; the exit code is 1 where a peak is above 1.05 of its plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwq_mlx.model.device import backend_name  # noqa: E402 - the path must be set first
from qwq_mlx.model.folder import open_model_folder  # noqa: E402
from qwq_mlx.model.load import build_module  # noqa: E402
from qwq_mlx.model.memory.plan import Workload, plan_memory  # noqa: E402
from qwq_mlx.model.memory.splits import pipeline_split  # noqa: E402
from qwq_mlx.model.ranks import load_part  # noqa: E402
from qwq_mlx.model.split import Split, tensor_obstacle, tensor_split  # noqa: E402
from qwq_mlx.model.upstream import import_mlx  # noqa: E402

_MOST = 1.05


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def load(folder: str, kind: Any, n_layers: list[int], rank: int) -> dict[str, float]:
    """Read one rank's part in this process."""
    files, split = open_model_folder(folder), Split(kind, tuple(n_layers))
    workload = Workload(context=1, prefill_step=1, split=split, rank=rank)
    plan = plan_memory(files, workload, backend=backend_name())
    mx = import_mlx()
    compute_type = "float32" if backend_name() == "cpu" else "bfloat16"
    module = build_module(files.config, files.packed)
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    group = SimpleNamespace(rank=lambda: rank, size=lambda: split.n_ranks)
    read_before = int(Path("/proc/self/io").read_text().split()[1])
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    load_part(module, files, split, group, compute_type, lambda share: None)
    read = int(Path("/proc/self/io").read_text().split()[1]) - read_before
    return {"plan": plan.weights_bytes + plan.load_bytes, "peak": status("VmHWM") - before, "read": read}


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(options.model, *json.loads(options.one))))
        return 0
    files, n = open_model_folder(options.model), options.ranks
    backend = backend_name()
    splits = [pipeline_split(files, Workload(), [None] * n, backend=backend)]
    if tensor_obstacle(files.config, files.packed, n) is None:
        splits.insert(0, tensor_split(files.config, n))
    print("| split | rank | holds | plan | peak while it reads | of the plan | bytes read |\n" + "|---" * 7 + "|")
    worst = 0.0
    for split in splits:
        for rank in range(n):
            one = json.dumps([split.kind, split.n_layers, rank])
            command = [sys.executable, __file__, options.model, "--one", one]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            worst = max(worst, told["peak"] / told["plan"])
            sizes = f"{told['plan'] / 1e6:,.0f} MB | {told['peak'] / 1e6:,.0f} MB | {told['peak'] / told['plan']:.3f}"
            print(f"| {split.kind} | {rank} | {split.describe(rank)} | {sizes} | {told['read'] / 1e6:,.0f} MB |")
    return 1 if worst > _MOST else 0


if __name__ == "__main__":
    sys.exit(main())
