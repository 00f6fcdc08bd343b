"""A checkpoint of QwQ-32B-Preview's shape with random weights, whole or with few layers: a folder, or bytes on demand.

    python scripts/qwq_shaped.py FOLDER --layers 4 [--shard-bytes 4000000000] [--tiny]

Names, shapes, dtype and the cut into shards are the real model's (64 layers: 771 tensors in 17 shards, 65.5 GB). Any
range of any shard can be made by itself, the same bytes each time and nearly as fast as memory is copied: a tensor's
data are pieces of one fixed pool of random bfloat16 numbers, taken from places that tensor and position decide. So a
server can offer 65.5 GB that never exist at once.

Does not: make weights that mean anything. The tokenizer is the tests' own, its ids far below the vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import encode_floats, write_json, write_tiny_checkpoint  # noqa: E402 - the paths must be set first

from qwq_mlx.facts import QWQ_32B_PREVIEW  # noqa: E402
from qwq_mlx.files.header import TensorEntry, place_tensors  # noqa: E402
from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes  # noqa: E402

SHARD_BYTES = 4_000_000_000  # at most; gives the published 17
_PIECE_BYTES = 1 << 20
_POOL_BYTES = 8 << 20
_WRITE_BYTES = 8 << 20
# scale around a mean: matrices as an initializer_range of 0.02 leaves them, norms near 1, biases small
_KINDS = {"matrix": (0.0, 0.02), "norm": (1.0, 0.1), "bias": (0.0, 0.1)}
_TINY = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
_TINY_VOCABULARY = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticShard:
    """One shard: its name, its first bytes (length and header) and where each tensor lies."""

    name: str
    head: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.entries[-1].end

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the file."""
        out = np.empty(end - start, np.uint8)
        head = np.frombuffer(self.head[start:end], np.uint8)
        out[: len(head)] = head
        at = start + len(head)
        place = bisect_right([entry.end for entry in self.entries], at)
        while at < end:
            entry = self.entries[place]
            upto = min(end, entry.end)
            _fill(entry, at - entry.start, out[at - start : upto - start])
            at, place = upto, place + 1
        return out.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticCheckpoint:
    """Small files by name, and the shards in order."""

    files: Mapping[str, bytes]
    shards: tuple[SyntheticShard, ...]

    @property
    def size_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


def synthetic_checkpoint(
    *, n_layers: int, shard_bytes: int = SHARD_BYTES, is_tiny: bool = False
) -> SyntheticCheckpoint:
    """Lay out a checkpoint; no weight is made yet. is_tiny: small widths, to try things out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_tiny_checkpoint(Path(temporary), n_layers=1)
        config = json.loads((folder / "config.json").read_text())
        config.update(_sizes(is_tiny), num_hidden_layers=n_layers, max_window_layers=n_layers)
        write_json(folder / "config.json", config)
        shapes = tensor_shapes(Qwen2Config.from_json(config, where="config.json"))
        groups = _cut(shapes, shard_bytes)
        shards = []
        for number, names in enumerate(groups, start=1):
            head, entries = place_tensors([(name, "BF16", shapes[name]) for name in names], {"format": "pt"})
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            shards.append(SyntheticShard(name=name, head=head, entries=tuple(entries)))
        total = sum(2 * math.prod(shape) for shape in shapes.values())
        weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    return SyntheticCheckpoint(files=files, shards=tuple(shards))


def write_checkpoint(checkpoint: SyntheticCheckpoint, folder: Path) -> None:
    """Write it all into a new folder, some MB in memory at a time."""
    folder.mkdir(parents=True)
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)
    for shard in checkpoint.shards:
        with (folder / shard.name).open("wb") as file:
            for start in range(0, shard.size_bytes, _WRITE_BYTES):
                file.write(shard.read(start, min(start + _WRITE_BYTES, shard.size_bytes)))


def _sizes(is_tiny: bool) -> dict[str, int]:
    facts = QWQ_32B_PREVIEW
    sizes = {name: getattr(facts, name) for name in (*_TINY, "vocab_size")}
    context = {"max_position_embeddings": 32_768, "sliding_window": 32_768}
    return {**_TINY, "vocab_size": _TINY_VOCABULARY} if is_tiny else {**sizes, **context}


def _cut(shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Names by shard: in order, each shard filled as far as the next tensor fits."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        if filled and filled + n_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += n_bytes
    return groups


def _fill(entry: TensorEntry, at: int, out: NDArray[np.uint8]) -> None:
    """A tensor's bytes from `at` on, as many as out holds."""
    kind = "matrix" if len(entry.shape) == 2 else "norm" if entry.name.endswith("norm.weight") else "bias"
    pool, seed, done = _pool(kind), _seed(entry.name), 0
    while done < len(out):
        piece, within = divmod(at + done, _PIECE_BYTES)
        n_bytes = min(_PIECE_BYTES - within, len(out) - done)
        n_places = (len(pool) - _PIECE_BYTES) // 2
        start = 2 * ((seed + piece * 0x9E3779B97F4A7C15 >> 7) % n_places) + within
        out[done : done + n_bytes] = pool[start : start + n_bytes]
        done += n_bytes


@functools.cache
def _seed(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (2**61 - 1)


@functools.cache
def _pool(kind: str) -> NDArray[np.uint8]:
    """Random bfloat16 numbers as bytes; larger ones are rare but there, as in trained weights (Student's t)."""
    mean, deviation = _KINDS[kind]
    random = np.random.default_rng(len(kind))
    n = (_POOL_BYTES if kind == "matrix" else 2 * _PIECE_BYTES) // 2
    parts = [mean + deviation * random.standard_t(8, _PIECE_BYTES) for _ in range(0, n, _PIECE_BYTES)]
    return np.frombuffer(b"".join(encode_floats(part, "BF16") for part in parts), np.uint8)


def main() -> int:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of QwQ's 64 (default: %(default)s)")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try things out")
    options = parser.parse_args()
    checkpoint = synthetic_checkpoint(n_layers=options.layers, shard_bytes=options.shard_bytes, is_tiny=options.tiny)
    write_checkpoint(checkpoint, options.folder)
    print(f"{options.folder}: {len(checkpoint.shards)} shards, {checkpoint.size_bytes:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
