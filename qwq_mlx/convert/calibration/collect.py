"""What a calibration text says of the channels, before the first tensor is packed: at once, or shard by shard.

A source that is there, or that stays once it is fetched, is run where it lies. From the Hub without --keep-source its
shards pass by twice: this pass first, then the packing one, each with two shards on the disk at most.

Does not: compute the importance (`calibration` does) or order shards (`first_pass` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qwq_mlx.convert.calibration.importance import Importance, begun_run, importance_of, read_importance
from qwq_mlx.convert.calibration.shard_order import PassingShards, pass_order
from qwq_mlx.convert.plan import Plan
from qwq_mlx.convert.progress import Progress, Report
from qwq_mlx.convert.source import Shards
from qwq_mlx.files.header import Header
from qwq_mlx.model.device import small_cache
from qwq_mlx.quant.recipe import layer_of

__all__ = ["importance_at_once", "importance_by_passing"]

Show = Callable[[Progress], None] | None


def importance_at_once(
    plan: Plan, kept: Sequence[Path], progress: Show, wanted: Sequence[Header], shards: Shards
) -> Importance:
    """By a source whose shards stay; empty without a text. kept: files that hold it afterwards, and may already.

    wanted: shards to wait for, should the text be run. Raises as `importance_of` does.
    """
    if plan.calibration is None:
        return {}
    _make_folders(kept)
    if not _is_known(plan, kept):
        for shard in wanted:
            shards.wait(shard.path.name)
    report, begun = Report(progress, plan.source_bytes), begun_run(plan.calibration, kept)
    return importance_of(plan.calibration, plan.checkpoint, kept, _show(plan, report), begun=begun)


def importance_by_passing(plan: Plan, kept: Sequence[Path], progress: Show) -> Importance:
    """By shards that are fetched for this pass alone; none, where one of `kept` is of this text. Raises as above."""
    assert plan.calibration is not None
    _make_folders(kept)
    begun = begun_run(plan.calibration, kept)
    n_done = 0 if begun is None else begun.n_layers
    order = pass_order(plan.checkpoint, plan.config, plan.calibration.name, n_done=n_done)
    report = Report(progress, plan.source_bytes, phase="calibrate")
    with (
        plan.origin.shards(
            () if _is_known(plan, kept) else order.shards, keep=False, progress=report.fetched
        ) as shards,
        small_cache(),
    ):
        passing = PassingShards(order, shards)
        found = importance_of(
            plan.calibration, plan.checkpoint, kept, _show(plan, report), before=passing.before, begun=begun
        )
        passing.after()
    return found


def _make_folders(kept: Sequence[Path]) -> None:
    for each in kept:
        each.parent.mkdir(exist_ok=True)
        for left in each.parent.glob(".*.tmp"):  # of a run that was killed as it wrote; it had the output's lock
            left.unlink()


def _is_known(plan: Plan, kept: Sequence[Path]) -> bool:
    """Whether one of `kept` is of the plan's text, so that it need not be run."""
    wanted = None if plan.calibration is None else plan.calibration.as_mapping()
    return wanted is not None and any(read_importance(each, wanted) is not None for each in kept)


def _show(plan: Plan, report: Report) -> Callable[[str], None]:
    n_layers, total = plan.config.num_hidden_layers, plan.source_bytes

    def show(path: str) -> None:
        layer = layer_of(path)
        done = total if layer is None else total * layer // n_layers
        report.packed(Progress(phase="calibrate", what=path, done_bytes=done, total_bytes=total))

    return show
