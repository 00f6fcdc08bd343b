"""One conversion from a source's folder to a published folder: the whole of journey 1, in its order.

    check -> plan -> [output.partial/: journal.jsonl, model/, source/] -> pack -> measure quality -> read back
    -> manifest -> rename

Nothing is written before every check has passed. From then on the work lives in the partial folder; the final name
appears by one rename. Whatever ends a run, the same call again continues it and repeats at most one tensor.

Does not: print. The plan and the progress go to the callbacks.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.convert.calibration import Importance, importance_of, read_calibration
from qwq_mlx.convert.check import check_disk, check_fit, check_output, check_source, partial_path
from qwq_mlx.convert.finish import describe, finish, keep_small_files, write_small_files
from qwq_mlx.convert.journal import Journal, read_description
from qwq_mlx.convert.judge import Judge, plan_judge
from qwq_mlx.convert.memory import peak_memory_bytes
from qwq_mlx.convert.origin import open_origin
from qwq_mlx.convert.pipeline import run_pipeline
from qwq_mlx.convert.plan import Plan, make_plan
from qwq_mlx.convert.progress import Progress, Report
from qwq_mlx.convert.write import create_shards, disk_fault
from qwq_mlx.errors import ConversionError, OptionError
from qwq_mlx.files.atomic import fsync_folder, publish
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.model.device import small_cache
from qwq_mlx.quality.result import Quality
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.recipe import load_recipe

__all__ = ["Conversion", "convert_checkpoint"]

_JOURNAL = "journal.jsonl"
_MODEL = "model"
_SOURCE = "source"
_CALIBRATION = "calibration"
_MAX_WORKERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    output: the folder. is_written: False for a dry run. relative_error: of all packed weights together (see
    quant.measure); None for a dry run. kl, top1_agreement: against the source (see quality.result), None where that was
    not measured. resumed_bytes: of source_bytes, what an earlier run had done.
    warnings: what was converted but looks odd, in sentences.
    """

    output: Path
    is_written: bool
    n_tensors: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    relative_error: float | None
    kl: float | None
    top1_agreement: float | None
    wall_s: float
    peak_memory_bytes: int
    resumed_bytes: int
    warnings: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
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
    of a .toml file. calibrate: a text (see `convert.calibration`) whose activations weigh the errors of the fit; None
    fits as the recipe says. force: replace an existing conversion, once the new one is complete. restart: throw an
    unfinished conversion of this output away instead of continuing it. keep_source: leave fetched shards and their
    small files in `output`.source. dry_run: stop after the plan. n_workers: threads that pack; None is one per core.
    quality: a text file to compare source and conversion on, True for a bundled text, False for nothing, None for the
    bundled text where the source is small (convert.judge.SMALL_BYTES). quality_tokens: of that text, at most. on_plan:
    called once with the plan, before anything is written. progress: called after every block and, from another thread,
    while shards are fetched.
    Raises OptionError, RecipeError, SourceError, LoadError, ConversionError; see `convert.check` for what is refused.
    """
    started = time.monotonic()
    output = Path(os.path.abspath(output))  # noqa: PTH100 - a link at the end is not followed
    chosen, workers = load_recipe(recipe), _n_workers(n_workers)
    check_output(output, Path(source) if os.path.lexists(source) else None, force=force)
    unfinished = None if restart else _unfinished(partial_path(output))
    with open_origin(source, revision=revision, unfinished=unfinished) as opened:
        check_fit(chosen, calibrate, is_remote=opened.is_remote)
        local = None if opened.is_remote else opened.checkpoint.folder
        config = check_source(opened.checkpoint, chosen)
        text = None if calibrate is None else read_calibration(calibrate, opened.checkpoint, config)
        fetched = output.with_name(f"{output.name}.source") if keep_source else partial_path(output) / _SOURCE
        origin = opened.placed_in(fetched) if opened.is_remote else opened
        plan = make_plan(origin, config, chosen, n_workers=workers, keep_source=keep_source, calibration=text)
        check_disk(plan, output)
        judge = plan_judge(plan, quality, n_tokens=quality_tokens, keep_source=keep_source)
        plan = replace(plan, quality_note=judge.note)
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            return _conversion(plan, output, None, started, quality=None, resumed_bytes=0)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with FolderLock(output):
                check_output(output, local, force=force)  # again: another process may have finished it meanwhile
                job = _Job(plan, output, judge, force, restart, keep_source, progress)
                return job.run(started)
        except OSError as error:
            raise disk_fault(error, output, plan.output_bytes) from error


@dataclass(frozen=True, slots=True)
class _Job:
    """An accepted conversion, under its lock."""

    plan: Plan
    output: Path
    judge: Judge
    force: bool
    restart: bool
    keep_source: bool
    progress: Callable[[Progress], None] | None

    def run(self, started: float) -> Conversion:
        plan, partial = self.plan, partial_path(self.output)
        journal = _open_partial(plan, partial, restart=self.restart)
        resumed = sum(e.source.end - e.source.start for e in plan.tensors if e.source.name in journal.done)
        try:
            self._pack(partial / _MODEL, journal, self._importance(partial / _CALIBRATION))
        finally:
            journal.close()
        run: dict[str, float] = {"n_workers": plan.n_workers, "resumed_bytes": resumed}
        write_small_files(plan, partial / _MODEL)
        quality = self.judge.measure(plan, partial / _MODEL, self.progress)
        run["wall_s"] = round(time.monotonic() - started, 3)
        finish(plan, partial / _MODEL, journal.done, run, quality=quality, progress=self.progress)
        publish(partial / _MODEL, self.output, replace=self.force)
        shutil.rmtree(partial)
        fsync_folder(self.output.parent)
        return _conversion(plan, self.output, journal, started, quality=quality, resumed_bytes=resumed)

    def _importance(self, folder: Path) -> Importance:
        """What the calibration text says, empty without one. folder: where it is kept."""
        plan, text = self.plan, self.plan.calibration
        if text is None:
            return {}
        n_layers, total = plan.config.num_hidden_layers, plan.source_bytes

        def show(path: str) -> None:
            if self.progress is not None:
                layer = int(path.split(".")[2]) if path.startswith("model.layers.") else n_layers
                done = total * layer // n_layers
                self.progress(Progress(phase="calibrate", what=path, done_bytes=done, total_bytes=total))

        folder.mkdir(exist_ok=True)
        with small_cache():
            return importance_of(text, plan.checkpoint, folder / "importance.safetensors", show)

    def _pack(self, folder: Path, journal: Journal, importance: Importance) -> None:
        plan, report = (
            self.plan,
            Report(self.progress, sum(each.source.end - each.source.start for each in self.plan.tensors)),
        )
        wanted = list(plan.checkpoint.shards)
        if plan.origin.is_remote:
            left = {each.shard for each in plan.tensors if each.source.name not in journal.done}
            wanted = [plan.checkpoint.shards[index] for index in sorted(left)]
            report.fetched(plan.source_bytes - sum(shard.size_bytes for shard in wanted))
            fetched = plan.checkpoint.shards[0].path.parent
            fetched.mkdir(exist_ok=True)
            if self.keep_source:
                keep_small_files(plan, fetched)
        with (
            plan.origin.shards(wanted, keep=self.keep_source, progress=report.fetched) as shards,
            small_cache(),
        ):
            run_pipeline(plan, folder, journal, shards, report.packed, importance)


def _unfinished(partial: Path) -> tuple[str, str] | None:
    """Repository and commit that an unfinished conversion is made from."""
    description = read_description(partial / _JOURNAL)
    repository, commit = description.get("repository"), description.get("commit")
    return (repository, commit) if isinstance(repository, str) and isinstance(commit, str) else None


def _open_partial(plan: Plan, partial: Path, *, restart: bool) -> Journal:
    """Continue the unfinished conversion in `partial`, or lay out a new one."""
    path, model = partial / _JOURNAL, partial / _MODEL
    if os.path.lexists(partial):
        if not partial.is_dir() or {each.name for each in partial.iterdir()} - {
            _JOURNAL,
            _MODEL,
            _SOURCE,
            _CALIBRATION,
        }:
            raise ConversionError(
                f"{partial}: is not an unfinished conversion, but has the name of one. "
                "Move it away, or choose another output."
            )
        if path.is_file() and model.is_dir() and not restart:
            journal = Journal.resume(path, describe(plan))
            if journal is not None:
                for each in model.iterdir():  # a kill may have left a small file's temporary, named after its process
                    if each.name not in {shard.name for shard in plan.shards}:
                        each.unlink()
                return journal
        for each in (path, model, partial / _CALIBRATION):  # what was fetched is proven again, so it may stay
            _remove(each)
    model.mkdir(parents=True)
    create_shards(plan, model)
    journal = Journal.create(path, describe(plan))
    fsync_folder(partial)
    fsync_folder(partial.parent)
    return journal


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _conversion(
    plan: Plan,
    output: Path,
    journal: Journal | None,
    started: float,
    *,
    quality: Quality | None,
    resumed_bytes: int,
) -> Conversion:
    packed = [each.source.name for each in plan.tensors if each.packing is not None]
    done = [] if journal is None else [journal.done[name] for name in packed]
    error2, weight2 = sum(each.error2 for each in done), sum(each.weight2 for each in done)
    return Conversion(
        output=output,
        is_written=journal is not None,
        n_tensors=len(plan.tensors),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        relative_error=math.sqrt(error2 / weight2) if weight2 else None,
        kl=None if quality is None else quality.kl,
        top1_agreement=None if quality is None else quality.top1_agreement,
        wall_s=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
        resumed_bytes=resumed_bytes,
        warnings=_warnings(plan, journal),
    )


def _warnings(plan: Plan, journal: Journal | None) -> tuple[str, ...]:
    if journal is None:
        return ()
    found = []
    for tensor in plan.tensors:
        done, path = journal.done[tensor.source.name], plan.checkpoint.shards[tensor.shard].path.name
        if done.weight2 == 0:
            found.append(f"{path}: every weight of {done.name} is zero. Compare the shard's sha256 with the source's.")
        elif done.zero_pages:
            found.append(
                f"{path}: {done.name} has {done.zero_pages:,} pages (4,096 bytes) of zeros, as lost writes leave them. "
                "Compare the shard's sha256 with the source's."
            )
    return tuple(found)


def _n_workers(n: int | None) -> int:
    if n is None:
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(n_cores, _MAX_WORKERS)
    if type(n) is not int or not 1 <= n <= _MAX_WORKERS:
        raise OptionError(f"n_workers is {n!r}, expected a whole number from 1 to {_MAX_WORKERS}.")
    return n
