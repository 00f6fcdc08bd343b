"""One of several processes that hold a model together: what it has of the model, and how it reads that.

Only the bytes of a rank's part are read, a tensor at a time and the largest first, so that what stands in memory twice
for a moment does so while there is room.

Does not: say who holds what (`split` does), or what the processes do together (`engine.ranks` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwq_mlx.files.header import Header, TensorEntry
from qwq_mlx.files.rows import read_columns, read_rows
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.pipeline import make_stage
from qwq_mlx.model.split import Split
from qwq_mlx.model.tensor_bytes import array_of

__all__ = ["Ranks", "load_part", "ranks_of", "read_part"]


def load_part(
    module: Any,
    files: ModelFolder,
    split: Split,
    group: Any,
    compute_type: str,
    progress: Callable[[float], None],
) -> None:
    """Make of a whole module, whose weights are placeholders, the part of one rank, and read its weights.

    progress: called with the share of bytes that is read. Raises SourceError.
    """
    rank, config = group.rank(), files.config
    if split.kind == "tensor":
        module.shard(group)
    else:
        make_stage(module, split, group)
    for parent, name in ((module.model, "embed_tokens"), (module.model, "norm"), (module, "lm_head")):
        path = f"model.{name}" if parent is module.model else name
        if name in parent and not split.holds(f"{path}.weight", rank, config):
            parent.pop(name)
    weights: dict[str, Any] = {}
    wanted = [name for name in files.checkpoint.tensors if split.holds(name, rank, config)]
    sizes = {name: entry.end - entry.start for name, (_, entry) in files.checkpoint.tensors.items()}
    n_read, n_all = 0, sum(sizes[name] for name in wanted)
    for name in sorted(wanted, key=sizes.__getitem__, reverse=True):
        shard, entry = files.checkpoint.tensors[name]
        weights[name] = read_part(shard, entry, split.axis_of(name), rank, split.n_ranks, compute_type)
        n_read += sizes[name]
        progress(n_read / n_all)
    module.load_weights(list(weights.items()), strict=True)
    module.ranks = Ranks(group, split, config)


def read_part(shard: Header, entry: TensorEntry, axis: int | None, rank: int, n_ranks: int, compute_type: str) -> Any:
    """A rank's part of a tensor along an axis, evaluated: floats in the compute type, codes as they are.

    Only its bytes are read; of a tensor split by columns (axis 1) also those that lie between in less than 4 KiB, with
    which 64 MiB are held beside the part. Raises SourceError.
    """
    shape = entry.shape
    if axis is None:
        return array_of(read_rows(shard, entry), entry.dtype, shape, compute_type)
    size = shape[axis] // n_ranks
    if axis == 0:
        raw = read_rows(shard, entry, range(rank * size, (rank + 1) * size))
        return array_of(raw, entry.dtype, (size, *shape[1:]), compute_type)
    n_bytes = (entry.end - entry.start) // shape[0] // n_ranks  # of a row
    raw = read_columns(shard, entry, range(rank * n_bytes, (rank + 1) * n_bytes))
    return array_of(raw, entry.dtype, (shape[0], size), compute_type)


class Ranks:
    """The processes that hold a model together, and what one of them has of it.

    group: from `mx.distributed.init`.
    split: who holds what.
    n_layers: of the model. layers: of them, those that this rank has.
    kv_heads: of the model's, those in this rank's KV caches.
    sends: what it computes goes to another rank, so that it has to be computed also where nobody here reads it.
    limits: what the device of each rank gives, None where nothing is refused; rank 0 is told.
    """

    def __init__(self, group: Any, split: Split, config: Qwen2Config) -> None:
        self.group, self.split = group, split
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.n_layers = config.num_hidden_layers
        self.layers = split.layers_of(self.rank)
        self.kv_heads = split.kv_heads_of(self.rank, config)
        self.sends = split.kind == "pipeline" and self.rank > 0
        self.limits: list[int | None] = [None] * self.size


def ranks_of(module: Any) -> Ranks | None:
    """The ranks that hold a loaded model together; None where it is whole in this process."""
    ranks: Ranks | None = getattr(module, "ranks", None)
    return ranks
