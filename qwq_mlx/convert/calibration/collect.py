"""What a calibration text says of the channels, before the first tensor is packed: at once, or shard by shard.

A source that is there, or that stays once it is fetched, is run where it lies. From the Hub without keep_source its
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


def importance_at_once(plan: Plan, path: Path, progress: Show, wanted: Sequence[Header], shards: Shards) -> Importance:
    """By a source whose shards stay; empty without a text. path: a file that holds it afterwards, and may already.

    wanted: shards to wait for, should the text be run. Raises as `importance_of` does.
    """
    if plan.calibration is None:
        return {}
    _make_folder(path)
    if not _is_known(plan, path):
        for shard in wanted:
            shards.wait(shard.path.name)
    report, begun = Report(progress, plan.source_bytes), begun_run(plan.calibration, path)
    return importance_of(plan.calibration, plan.checkpoint, path, _show(plan, report), begun=begun)


def importance_by_passing(plan: Plan, path: Path, progress: Show) -> Importance:
    """By shards that are fetched for this pass alone; none, where `path` is of this text. Raises as above."""
    assert plan.calibration is not None
    _make_folder(path)
    begun = begun_run(plan.calibration, path)
    n_done = 0 if begun is None else begun.n_layers
    order = pass_order(plan.checkpoint, plan.config, plan.calibration.name, n_done=n_done)
    report = Report(progress, plan.source_bytes, phase="calibrate")
    shards_to_fetch = () if _is_known(plan, path) else order.shards
    with plan.origin.shards(shards_to_fetch, keep=False, progress=report.fetched) as shards, small_cache():
        passing = PassingShards(order, shards)
        importance = importance_of(
            plan.calibration, plan.checkpoint, path, _show(plan, report), before=passing.before, begun=begun
        )
        passing.after()
    return importance


def _make_folder(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    for temporary in path.parent.glob(".*.tmp"):  # of a run that was killed as it wrote; it had the output's lock
        temporary.unlink()


def _is_known(plan: Plan, path: Path) -> bool:
    """Whether the file is of the plan's text, so that it need not be run."""
    return plan.calibration is not None and read_importance(path, plan.calibration.as_mapping()) is not None


def _show(plan: Plan, report: Report) -> Callable[[str], None]:
    n_layers, total = plan.config.num_hidden_layers, plan.source_bytes

    def show(path: str) -> None:
        layer = layer_of(path)
        done = total if layer is None else total * layer // n_layers
        report.packed(Progress(phase="calibrate", what=path, done_bytes=done, total_bytes=total))

    return show
