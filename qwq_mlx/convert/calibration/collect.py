"""The calibration pass, before the first tensor is packed: at once, or shard by shard.

A source that is there, or that stays once it is fetched, is run where it lies. From the Hub without keep_source its
shards pass by twice: this pass first, then the packing one, each with two shards on the disk at most.

The text passes the embedding, the layers in their order and the final norm, so a shard is needed from the first of
these parts that lies in it to the last. In checkpoints as they are published the parts lie in this order and a layer
reaches from one shard into the next at most, so two shards are enough. A shard of the output matrix alone is not
fetched here, for only its input counts; where a GPU would fit it and it is not there, it is fitted as it is converted.

Does not: fit, or remember how far the text came (`fit_layers` does both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwq_mlx.convert.calibration.fit_layers import fit_layers, run_mapping, saved_pass
from qwq_mlx.convert.calibration.fitted import FittedMatrices, open_fitted
from qwq_mlx.convert.plan import Plan
from qwq_mlx.convert.progress import ConvertProgress, SharedProgress
from qwq_mlx.convert.source import Shards
from qwq_mlx.errors import OptionError
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.header import Header
from qwq_mlx.files.hub.prefetch import N_ON_DISK
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.device import small_cache
from qwq_mlx.quant.recipe import layer_of

__all__ = ["PassOrder", "PassingShards", "fit_at_once", "fit_by_passing", "pass_order"]

Show = Callable[[ConvertProgress], None] | None


def fit_at_once(plan: Plan, folder: Path, progress: Show, wanted: Sequence[Header], shards: Shards) -> FittedMatrices:
    """By a source whose shards stay; nothing without a text. folder: holds it afterwards, and may already.

    wanted: shards to wait for, should the text be run. Raises as `fit_layers` does.
    """
    if plan.calibration is None:
        return FittedMatrices()
    _make_folder(folder)
    if (known := _known(plan, folder)) is not None:
        return known
    for shard in wanted:
        shards.wait(shard.path.name)
    report = SharedProgress(progress, plan.source_bytes)
    return fit_layers(plan, folder, _show(plan, report), state=saved_pass(plan, folder))


def fit_by_passing(plan: Plan, folder: Path, progress: Show) -> FittedMatrices:
    """By shards that are fetched for this pass alone; none, where the folder has all of it. Raises as above."""
    assert plan.calibration is not None
    _make_folder(folder)
    if (known := _known(plan, folder)) is not None:
        return known
    state = saved_pass(plan, folder)
    n_done = 0 if state is None else state.n_layers
    order = pass_order(plan.checkpoint, plan.config, plan.calibration.name, n_done=n_done)
    report = SharedProgress(progress, plan.source_bytes, phase="calibrate")
    with plan.origin.shards(order.shards, keep=False, progress=report.fetched) as shards, small_cache():
        passing = PassingShards(order, shards)
        fitted = fit_layers(
            plan, folder, _show(plan, report), before=passing.before, is_there=passing.holds, state=state
        )
        passing.after()
    return fitted


def _make_folder(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # of a run that was killed as it wrote; it had the output's lock
        temporary.unlink()


def _known(plan: Plan, folder: Path) -> FittedMatrices | None:
    """What a complete pass of the plan's text left, so that it need not be run."""
    return open_fitted(folder, plan, run_mapping(plan))


def _show(plan: Plan, report: SharedProgress) -> Callable[[str], None]:
    n_layers, total = plan.config.num_hidden_layers, plan.source_bytes

    def show(path: str) -> None:
        layer = layer_of(path)
        done_bytes = total if layer is None else total * layer // n_layers
        report.packed(ConvertProgress(phase="calibrate", what=path, done_bytes=done_bytes, total_bytes=total))

    return show


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
        part_shards = {h.path.name: h for name, (h, _) in checkpoint.tensors.items() if name.startswith(part)}
        shards.update(part_shards)
        needed[part] = tuple(part_shards)
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

    def holds(self, shard: str) -> bool:
        """Whether a shard is there now, by its name."""
        return shard in self._held

    def after(self) -> None:
        """Drop the rest."""
        while self._held:
            self.shards.drop(self._held.pop())
