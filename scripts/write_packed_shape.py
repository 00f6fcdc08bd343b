"""A folder of packed random weights in QwQ-32B-Preview's shape, as a conversion to 4 bits lays them out.

    python scripts/write_packed_shape.py FOLDER [--layers 64]

For what begins at a folder, at full size, without the real weights: `python -m qwq_mlx.bench load first-token --model
FOLDER --layers 0`. 64 layers are 18 GB, on the disk and, while they are written, in memory.

Does not: make weights that mean anything, or a manifest. The tokenizer is the tests' own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from qwq_shaped import synthetic_checkpoint  # noqa: E402 - the paths must be set first

from qwq_mlx.bench.models import PACKING, qwq_shaped, random_module  # noqa: E402
from qwq_mlx.model.load import default_compute_type  # noqa: E402

_SHARD_BYTES = 4_000_000_000


def main() -> int:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--layers", type=int, default=64, metavar="N", help="of QwQ's 64 (default: %(default)s)")
    options = parser.parse_args()
    n_bytes = write_packed(options.folder, n_layers=options.layers)
    print(f"{options.folder}: {n_bytes:,} bytes of weights", file=sys.stderr)
    return 0


def write_packed(folder: Path, *, n_layers: int) -> int:
    """Write the folder; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config, packed = qwq_shaped(n_layers)
    small_files = synthetic_checkpoint(n_layers=n_layers).files
    for name, content in small_files.items():
        if not name.endswith(".index.json"):
            (folder / name).write_bytes(content)
    settings = json.loads(small_files["config.json"])
    settings["quantization"] = {"group_size": PACKING.group_size, "bits": PACKING.bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    weights = dict(tree_flatten(random_module(config, packed, default_compute_type(), seed=0).parameters()))
    shards = _cut(weights)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), {key: weights[key] for key in shard}, {"format": "mlx"})
    n_bytes: int = sum(array.nbytes for array in weights.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return n_bytes


def _cut(weights: dict[str, Any]) -> list[list[str]]:
    """Names by shard: in order, each shard filled as far as the next array fits."""
    shards: list[list[str]] = [[]]
    n_bytes = 0
    for name, array in weights.items():
        if shards[-1] and n_bytes + array.nbytes > _SHARD_BYTES:
            shards.append([])
            n_bytes = 0
        shards[-1].append(name)
        n_bytes += array.nbytes
    return shards


if __name__ == "__main__":
    sys.exit(main())
