"""The pass of a calibration text over shards that are fetched, used and dropped: two on the disk, as for packing.

The text passes the embedding, the layers in their order and the final norm, so a shard is needed from the first of
these parts that lies in it to the last. In checkpoints as they are published the parts lie in this order and a layer
reaches from one shard into the next at most, so two shards are enough. The packing pass, which needs what this one
found, fetches the shards again. A shard of the output matrix alone is not fetched here: only its input counts.

Does not: run the text, or remember how far it came (`calibration` does both).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwq_mlx.convert.source import Shards
from qwq_mlx.errors import OptionError
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.header import Header
from qwq_mlx.files.hub.prefetch import N_ON_DISK
from qwq_mlx.model.architecture import Qwen2Config

__all__ = ["PassOrder", "PassingShards", "pass_order"]


@dataclass(frozen=True, slots=True)
class PassOrder:
    """shards: in the order in which a text needs them. needed: beginning of a part's tensor names -> its shards' names,
    in the order of the parts."""

    shards: tuple[Header, ...]
    needed: dict[str, tuple[str, ...]]


def pass_order(checkpoint: Checkpoint, config: Qwen2Config, text: str | Path, *, n_done: int = 0) -> PassOrder:
    """The order for a checkpoint. text: the calibration text, for the message. n_done: layers that it has passed.

    Raises OptionError for one whose parts lie so that more than two shards would have to be there at a time.
    """
    layers = (f"model.layers.{index}." for index in range(n_done, config.num_hidden_layers))
    shards: dict[str, Header] = {}
    needed: dict[str, tuple[str, ...]] = {}
    for part in (*(() if n_done else ("model.embed_tokens.",)), *layers, "model.norm."):
        found = {h.path.name: h for name, (h, _) in checkpoint.tensors.items() if name.startswith(part)}
        shards.update(found)
        needed[part] = tuple(found)
    for part in needed:
        there = _there(needed, part)
        if len(there) > N_ON_DISK:
            raise OptionError(
                f"calibrate is {str(text)!r}: the text passes the layers one by one, and at {part.rstrip('.')} "
                f"{len(there)} shards would have to be on the disk ({', '.join(there)}); from the Hub {N_ON_DISK} are "
                "there at a time. Add `keep_source=True`, which leaves all in OUTPUT.source (the plan says how much), "
                "or give the folder of a checkpoint that is there."
            )
    return PassOrder(tuple(shards.values()), needed)


def _there(needed: dict[str, tuple[str, ...]], part: str) -> list[str]:
    """Names of the shards that are fetched by then and not done."""
    parts = list(needed)
    at = parts.index(part)
    fetched = {name for each in parts[: at + 1] for name in needed[each]}
    return sorted(fetched & {name for each in parts[at:] for name in needed[each]})


@dataclass(slots=True)
class PassingShards:
    """Waits for the shards of a part before it is read, and drops those that no later part needs."""

    order: PassOrder
    shards: Shards
    _held: set[str] = field(default_factory=set)

    def before(self, part: str) -> None:
        """part: of PassOrder.needed, the one that is read next. Raises SourceError where a shard cannot be fetched."""
        there = _there(self.order.needed, part)
        for name in sorted(self._held.difference(there)):
            self._held.remove(name)
            self.shards.drop(name)
        for name in self.order.needed[part]:
            self.shards.wait(name)
            self._held.add(name)

    def after(self) -> None:
        """Drop the rest."""
        while self._held:
            self.shards.drop(self._held.pop())
