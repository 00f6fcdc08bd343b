"""Conversions of one source, from its folder to published folders: the whole of journey 1, in its order.

    check -> plan -> [output.partial/: journal.jsonl, model/, source/] -> pack -> measure quality -> read back
    -> manifest -> rename

Nothing is written before every check has passed. From then on the work lives in the partial folder; the final name
appears by one rename. Whatever ends a run, the same call again continues it and repeats at most one tensor. Several
recipes share one pass over the source; each has its own partial folder, journal, lock and final name.

Does not: print. The plans and the progress go to the callbacks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.convert.calibration.collect import importance_at_once, importance_by_passing
from qwq_mlx.convert.calibration.importance import read_calibration
from qwq_mlx.convert.calibration.shard_order import pass_order
from qwq_mlx.convert.finalize import finish, keep_small_files, write_small_files
from qwq_mlx.convert.journal import Journal
from qwq_mlx.convert.options import ConvertOptions
from qwq_mlx.convert.pipeline import Target, run_pipeline
from qwq_mlx.convert.plan import Plan, make_plan
from qwq_mlx.convert.preflight import check_apart, check_disk, check_fit, check_output, check_source, partial_path
from qwq_mlx.convert.progress import Progress, Report
from qwq_mlx.convert.quality_step import Judge, measure_quality, plan_judge
from qwq_mlx.convert.result import Conversion, conversion_of
from qwq_mlx.convert.source import Origin, open_origin
from qwq_mlx.convert.staging import (
    MODEL,
    SOURCE,
    importance_path,
    is_marked,
    open_partial,
    published,
    remove_partial,
    unfinished_source,
)
from qwq_mlx.convert.target_size import recipes_for_size
from qwq_mlx.convert.write import disk_fault
from qwq_mlx.errors import OptionError
from qwq_mlx.files.atomic import publish
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.manifest import read_manifest
from qwq_mlx.model.device import small_cache
from qwq_mlx.quality.result import Quality
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.recipe import Recipe, load_recipe

__all__ = ["Conversion", "convert_checkpoint", "convert_recipes"]

_MAX_WORKERS = 64


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    target_bytes: int | None = None,
    calibrate: str | Path | None = None,
    force: bool = False,
    restart: bool = False,
    keep_source: bool = False,
    dry_run: bool = False,
    n_workers: int | None = None,
    quality: str | Path | bool | None = None,
    quality_tokens: int | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a checkpoint into packed MLX weights in a new folder.

    source: a folder, or a repository of the Hub (OWNER/NAME) where no folder has that name; its shards are fetched one
    after another, two on the disk at most. revision: of the repository. recipe: a name under conversions/, or the path
    of a .toml file. target_bytes: choose the bits of every matrix so that the output, but for manifest and report, is
    no larger (see `convert.target`); None takes the recipe's. calibrate: a text (see `convert.calibration`) whose
    activations weigh the errors of the fit; None fits as the recipe says. force: replace an existing conversion, once
    the new one is complete. restart: throw an unfinished conversion of this output away instead of continuing it.
    keep_source: leave fetched shards and their small files in `output`.source. dry_run: stop after the plan. n_workers:
    threads that pack; None is one per core. quality: a text file to compare source and conversion on, True for a
    bundled text, False for nothing, None for the bundled text where the source is small (convert.judge.SMALL_BYTES).
    quality_tokens: of that text, at most. on_plan: called once with the plan, before anything is written. progress:
    called after every block and, from another thread, while shards are fetched.
    Raises OptionError, RecipeError, SourceError, LoadError, ConversionError; see `convert.check` for what is refused.
    """
    options = ConvertOptions(
        revision=revision,
        target_bytes=target_bytes,
        calibrate=calibrate,
        force=force,
        restart=restart,
        keep_source=keep_source,
        dry_run=dry_run,
        n_workers=n_workers,
        quality=quality,
        quality_tokens=quality_tokens,
    )
    told = None if on_plan is None else lambda plans: on_plan(plans[0])
    return convert_recipes(source, {output: recipe}, options, on_plan=told, progress=progress)[0]


def convert_recipes(
    source: str | Path,
    outputs: Mapping[str | Path, str | Path],
    options: ConvertOptions | None = None,
    *,
    on_plan: Callable[[Sequence[Plan]], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Conversion, ...]:
    """Convert a checkpoint by several recipes in one pass: every byte of the source is read, and fetched, once.

    outputs: folder to make -> its recipe. Each folder is what `convert_checkpoint` makes, byte for byte but for the
    figures of the run in its manifest. on_plan: called once with all plans, in that order. Returns a result for each.
    After a kill the same call goes on with every output from where it was; a finished one is left alone. An output
    that is there from another run is refused as in `convert_checkpoint`.
    Raises what that raises; OptionError for outputs that lie in each other.
    """
    started, options = time.monotonic(), options or ConvertOptions()
    recipes = {Path(os.path.abspath(each)): load_recipe(recipe) for each, recipe in outputs.items()}  # noqa: PTH100 - a link at the end is not followed
    if len(recipes) < max(1, len(outputs)):
        raise OptionError(f"outputs are {', '.join(map(str, outputs))}, expected one or more different folders.")
    check_apart(recipes)
    n_workers, local = _n_workers(options.n_workers), Path(source) if os.path.lexists(source) else None
    for output in recipes:
        check_output(output, local, force=options.force or (is_marked(output) and not options.restart))
    known = (None if options.restart else unfinished_source(each) for each in recipes)
    unfinished = next((each for each in known if each is not None), None)
    with open_origin(source, revision=options.revision, unfinished=unfinished) as opened:
        plans = _plans(opened, recipes, options, n_workers)
        judges = [
            plan_judge(each, options.quality, n_tokens=options.quality_tokens, keep_source=options.keep_source)
            for each in plans.values()
        ]
        pairs = zip(plans.items(), judges, strict=True)
        plans = {output: replace(plan, quality_note=judge.note) for (output, plan), judge in pairs}
        if on_plan is not None:
            on_plan(tuple(plans.values()))
        if options.dry_run:
            return tuple(conversion_of(plan, output, None, started) for output, plan in plans.items())
        try:
            for output in plans:
                output.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as locks:
                for output in plans:
                    locks.enter_context(FolderLock(output))
                return _Job(plans, tuple(judges), None if opened.is_remote else local, options, progress).run(started)
        except OSError as error:
            raise disk_fault(error, next(iter(plans)), sum(each.output_bytes for each in plans.values())) from error


def _plans(opened: Origin, recipes: Mapping[Path, Recipe], options: ConvertOptions, n_workers: int) -> dict[Path, Plan]:
    """Everything that can be refused from headers and texts alone is refused here."""
    for recipe in recipes.values():
        check_fit(recipe, options.calibrate)
    config = check_source(opened.checkpoint, recipes.values())
    if options.target_bytes is not None:
        recipes = recipes_for_size(opened, config, recipes, options.target_bytes)
    text = None if options.calibrate is None else read_calibration(options.calibrate, opened.checkpoint, config)
    if text is not None and opened.is_remote and not options.keep_source:
        pass_order(opened.checkpoint, config, text.name)
    first = next(iter(recipes))
    fetched = first.with_name(f"{first.name}.source") if options.keep_source else partial_path(first) / SOURCE
    origin = opened.placed_in(fetched) if opened.is_remote else opened
    plans = {
        output: make_plan(
            origin,
            config,
            recipe,
            n_workers=n_workers,
            keep_source=options.keep_source,
            calibration=text,
            n_together=len(recipes),
        )
        for output, recipe in recipes.items()
    }
    done = {each for each, plan in plans.items() if not options.restart and published(plan, each) is not None}
    peaks = {output: 0 if output in done else plan.output_bytes for output, plan in plans.items()}
    check_disk({**peaks, first: peaks[first] + plans[first].fetched_bytes})
    return plans


@dataclass(frozen=True, slots=True)
class _Job:
    """Accepted conversions, under their locks. local: the source's folder, None where it is fetched."""

    plans: Mapping[Path, Plan]
    judges: Sequence[Judge]
    local: Path | None
    options: ConvertOptions
    progress: Callable[[Progress], None] | None

    def run(self, started: float) -> tuple[Conversion, ...]:
        finished: dict[Path, Conversion] = {}
        for output, plan in self.plans.items():
            if not self.options.restart and (journal := published(plan, output)) is not None:
                finished[output] = self._as_before(plan, output, journal, started)
        left = [each for each in self.plans if each not in finished]
        for output in left:  # again: another process may have finished it meanwhile
            check_output(output, self.local, force=self.options.force)
        with ExitStack() as journals:
            targets = [self._target(output, journals) for output in left]
            resumed = [_done_bytes(each) for each in targets]
            if targets:
                self._pack(left, targets)
        for output, target in zip(left, targets, strict=True):
            write_small_files(target.plan, target.folder, importance_path(output))
        judges = [judge for output, judge in zip(self.plans, self.judges, strict=True) if output in left]
        plans, folders = [each.plan for each in targets], [each.folder for each in targets]
        qualities = measure_quality(judges, plans, folders, self.progress)
        for output, target, resumed_bytes, quality in zip(left, targets, resumed, qualities, strict=True):
            finished[output] = self._finish(output, target, resumed_bytes, quality, started)
        for output in self.plans:
            remove_partial(output)
        return tuple(finished[each] for each in self.plans)

    def _target(self, output: Path, journals: ExitStack) -> Target:
        journal = open_partial(self.plans[output], output, restart=self.options.restart)
        journals.callback(journal.close)
        return Target(self.plans[output], partial_path(output) / MODEL, journal)

    def _finish(
        self, output: Path, target: Target, resumed_bytes: int, quality: Quality | None, started: float
    ) -> Conversion:
        plan, done = target.plan, target.journal.done
        wall_s = round(time.monotonic() - started, 3)
        run: dict[str, float] = {"n_workers": plan.n_workers, "resumed_bytes": resumed_bytes, "wall_s": wall_s}
        finish(plan, target.folder, done, run, quality=quality, progress=self.progress)
        publish(target.folder, output, replace=self.options.force)
        kl, agreement = (None, None) if quality is None else (quality.kl, quality.top1_agreement)
        return conversion_of(plan, output, done, started, kl=kl, top1_agreement=agreement, resumed_bytes=resumed_bytes)

    def _as_before(self, plan: Plan, output: Path, journal: Journal, started: float) -> Conversion:
        """Of an output that an earlier run of this job has published."""
        quality = read_manifest(output).quality or {}
        return conversion_of(
            plan,
            output,
            journal.done,
            started,
            kl=quality.get("kl"),
            top1_agreement=quality.get("top1_agreement"),
            resumed_bytes=_done_bytes(Target(plan, output, journal)),
        )

    def _pack(self, outputs: Sequence[Path], targets: Sequence[Target]) -> None:
        plan = targets[0].plan
        report = Report(self.progress, sum(each.source.end - each.source.start for each in plan.tensors))
        wanted = list(plan.checkpoint.shards)
        if plan.origin.is_remote:
            lacking = {each.shard for t in targets for each in t.plan.tensors if each.source.name not in t.journal.done}
            wanted = [plan.checkpoint.shards[index] for index in sorted(lacking)]
            report.fetched(plan.source_bytes - sum(shard.size_bytes for shard in wanted))
            fetched = plan.checkpoint.shards[0].path.parent
            fetched.mkdir(exist_ok=True)
            if self.options.keep_source:
                keep_small_files(plan, fetched)
        keep, collected = self.options.keep_source, [importance_path(each) for each in outputs]
        passed = importance_by_passing(plan, collected, self.progress) if plan.n_fetches > 1 else None
        with plan.origin.shards(wanted, keep=keep, progress=report.fetched) as shards, small_cache():
            importance = passed or importance_at_once(plan, collected, self.progress, wanted, shards)
            run_pipeline(targets, shards, report.packed, importance)


def _done_bytes(target: Target) -> int:
    """Of the source, what the journal has."""
    return sum(e.source.end - e.source.start for e in target.plan.tensors if e.source.name in target.journal.done)


def _n_workers(n: int | None) -> int:
    if n is None:
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(n_cores, _MAX_WORKERS)
    if type(n) is not int or not 1 <= n <= _MAX_WORKERS:
        raise OptionError(f"n_workers is {n!r}, expected a whole number from 1 to {_MAX_WORKERS}.")
    return n
