"""A conversion, from its source to its published folder: the whole of journey 1, in its order.

    check -> plan -> [output.partial/: journal.jsonl, model/, source/] -> pack -> measure quality -> read back
    -> manifest -> rename

Nothing is written before every check has passed. From then on the work lives in the partial folder; the final name
appears by one rename. Whatever ends a run, the same call again continues it and repeats at most one tensor.

Does not: print. The plan and the progress go to the callbacks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.convert.calibration.collect import fit_at_once, fit_by_passing, pass_order
from qwq_mlx.convert.calibration.text import read_calibration
from qwq_mlx.convert.finalize import check_source_digest, finish, keep_small_files, write_small_files
from qwq_mlx.convert.gguf_recipe import gguf_recipe
from qwq_mlx.convert.journal import Journal
from qwq_mlx.convert.pipeline import run_pipeline
from qwq_mlx.convert.plan import Plan, make_plan
from qwq_mlx.convert.preflight import (
    check_calibration_fits_some,
    check_disk,
    check_fit,
    check_output,
    check_scale_dtype,
    check_source,
    partial_path,
)
from qwq_mlx.convert.progress import ConvertProgress, SharedProgress
from qwq_mlx.convert.quality_step import QualityPlan, measure_quality, plan_quality
from qwq_mlx.convert.result import Conversion, conversion_of
from qwq_mlx.convert.source import Origin, open_origin
from qwq_mlx.convert.staging import (
    MODEL,
    SOURCE,
    calibration_path,
    is_marked,
    open_partial,
    published,
    remove_partial,
    unfinished_source,
)
from qwq_mlx.convert.target_size import recipe_for_size
from qwq_mlx.convert.write import disk_fault
from qwq_mlx.errors import OptionError
from qwq_mlx.files.atomic import publish
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.manifest import read_manifest
from qwq_mlx.files.output_file import check_name
from qwq_mlx.model.device import small_cache
from qwq_mlx.model.template import read_template_file
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.compiled_fit import fit_kernel, is_compiled
from qwq_mlx.quant.recipe import Recipe, load_recipe

__all__ = ["Conversion", "convert_checkpoint"]

_MAX_WORKERS = 64


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    follow_links: bool = False,
    recipe: str | Path | None = None,
    scale_dtype: str | None = None,
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
    progress: Callable[[ConvertProgress], None] | None = None,
) -> Conversion:
    """Convert a checkpoint into packed MLX weights in a new folder.

    source: a folder; a GGUF by its path, as ollama:NAME[:TAG] or lmstudio:PUBLISHER/REPO; or a repository of the Hub
      (OWNER/NAME) where no folder has that name, fetched shard by shard.
    output: the folder to make; it appears whole, by one rename.
    revision: of the repository.
    chat_template: a file of jinja text that the conversion gets in place of the source's template.
    follow_links: read shards that links out of the source lead to, on another disk say.
    recipe: a name under conversions/, or the path of a .toml file; None is qwq-32b-preview-4bit, but of a quantized
      GGUF the one that keeps its codes where MLX can hold them.
    scale_dtype: of a GGUF's scales and biases, "bfloat16", "float16" or "float32"; None is bfloat16.
    target_bytes: choose the bits of every matrix so that the output is no larger, manifest and report not counted.
    calibrate: a text that the layers are run on as they are packed, so that their outputs are kept; "qwq" is one of
      QwQ-32B-Preview's that comes with the package. None fits the weights, as the recipe says.
    force: replace an existing conversion, once the new one is complete.
    restart: throw an unfinished conversion of this output away instead of continuing it.
    keep_source: leave fetched shards and their small files in `output`.source.
    dry_run: stop after the plan.
    n_workers: threads that pack; None is one per core.
    quality: text file to compare both on; True for a bundled one, False for none, None for True if the source is small.
    quality_tokens: of that text, at most.
    on_plan: called once with the plan, before anything is written.
    progress: called after every block and, from another thread, while shards are fetched.
    Raises OptionError, RecipeError, SourceError, LoadError, ConversionError; `convert.preflight` says what is refused.

    >>> qwq_mlx.convert_checkpoint(FOLDER, "pocket-3bit", recipe="3bit", quality=False).output_bytes
    2977470
    """
    started = time.monotonic()
    template = None if chat_template is None else read_template_file(Path(chat_template))
    output, n_workers = _named(output), _n_workers(n_workers)
    chosen = None if recipe is None else load_recipe(recipe)
    local = Path(source) if os.path.lexists(source) else None
    check_output(output, local, force=force or (is_marked(output) and not restart))
    unfinished = None if restart else unfinished_source(output)
    with open_origin(source, revision=revision, unfinished=unfinished, follow_links=follow_links) as opened:
        fetched = output.with_name(f"{output.name}.source") if keep_source else partial_path(output) / SOURCE
        origin = opened.placed_in(fetched) if opened.is_remote else opened
        plan = _plan(
            origin,
            chosen,
            n_workers,
            scale_dtype=scale_dtype,
            target_bytes=target_bytes,
            calibrate=calibrate,
            keep_source=keep_source,
            chat_template=template,
        )
        is_published = not restart and published(plan, output) is not None
        check_output(output, local, force=force or is_published)
        check_disk(output, plan.fetched_bytes + (0 if is_published else plan.output_bytes + plan.calibration_bytes))
        quality_plan = plan_quality(plan, quality, n_tokens=quality_tokens, keep_source=keep_source)
        peak_bytes = max(plan.peak_memory_bytes, quality_plan.peak_memory_bytes)
        plan = replace(plan, quality_note=quality_plan.note, peak_memory_bytes=peak_bytes)
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            return conversion_of(plan, output, None, started)
        return _Job(plan, quality_plan, output, local, force, restart, keep_source, progress).run(started)


def _plan(
    origin: Origin,
    recipe: Recipe | None,
    n_workers: int,
    *,
    scale_dtype: str | None,
    target_bytes: int | None,
    calibrate: str | Path | None,
    keep_source: bool,
    chat_template: str | None,
) -> Plan:
    """Everything that can be refused from headers and texts alone is refused here."""
    scales = check_scale_dtype(scale_dtype, origin.checkpoint)
    if recipe is None:
        is_repacked = origin.checkpoint.gguf is not None and target_bytes is None
        recipe = gguf_recipe(origin.checkpoint) if is_repacked else load_recipe(DEFAULT_RECIPE)
    check_fit(recipe, calibrate)
    config = check_source(origin.checkpoint, recipe)
    if target_bytes is not None:
        recipe = recipe_for_size(origin, config, recipe, target_bytes, scale_dtype=scales)
    text = None if calibrate is None else read_calibration(calibrate, origin.checkpoint, config)
    if text is not None and origin.is_remote and not keep_source:
        pass_order(origin.checkpoint, config, text.name)
    plan = make_plan(
        origin,
        config,
        recipe,
        n_workers=n_workers,
        keep_source=keep_source,
        calibration=text,
        chat_template=chat_template,
        scale_dtype=scales,
    )
    check_calibration_fits_some(plan)
    return plan


def _named(output: str | Path) -> Path:
    """The output's whole path. Raises OptionError where its last part is no name for a folder."""
    path = Path(os.path.abspath(output))  # noqa: PTH100 - a link at the end is not followed
    if not path.name:
        raise OptionError(f"output is {str(output)!r}, expected the name of a new folder.")
    check_name(path, name="output")
    return path


@dataclass(frozen=True, slots=True)
class _Job:
    """An accepted conversion; `run` takes its lock. local: what lies at the source's path, None where nothing does."""

    plan: Plan
    quality_plan: QualityPlan
    output: Path
    local: Path | None
    force: bool
    restart: bool
    keep_source: bool
    progress: Callable[[ConvertProgress], None] | None

    def run(self, started: float) -> Conversion:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with FolderLock(self.output):
                return self._run(started)
        except OSError as error:
            raise disk_fault(error, self.output, self.plan.output_bytes) from error

    def _run(self, started: float) -> Conversion:
        plan, output = self.plan, self.output
        if not self.restart and (journal := published(plan, output)) is not None:
            conversion = self._as_before(journal, started)
        else:
            check_output(output, self.local, force=self.force)  # again: another process may have finished it meanwhile
            conversion = self._convert(started)
        remove_partial(output)
        return conversion

    def _convert(self, started: float) -> Conversion:
        plan, output, folder = self.plan, self.output, partial_path(self.output) / MODEL
        journal = open_partial(plan, output, restart=self.restart)
        try:
            resumed_bytes = _done_bytes(plan, journal)
            self._pack(folder, journal)
        finally:
            journal.close()
        check_source_digest(plan, journal.finished)
        write_small_files(plan, folder)
        quality = measure_quality(self.quality_plan, plan, folder, self.progress)
        wall_s = round(time.monotonic() - started, 3)
        run: dict[str, float] = {"n_workers": plan.n_workers, "resumed_bytes": resumed_bytes, "wall_s": wall_s}
        finish(plan, folder, journal.finished, run, quality=quality, progress=self.progress)
        publish(folder, output, replace=self.force)
        shown = None if quality is None else quality.as_mapping()
        return conversion_of(plan, output, journal.finished, started, quality=shown, resumed_bytes=resumed_bytes)

    def _as_before(self, journal: Journal, started: float) -> Conversion:
        """Of an output that an earlier run of this job has published."""
        return conversion_of(
            self.plan,
            self.output,
            journal.finished,
            started,
            quality=read_manifest(self.output).quality,
            resumed_bytes=_done_bytes(self.plan, journal),
        )

    def _pack(self, folder: Path, journal: Journal) -> None:
        plan, keep, calibration = self.plan, self.keep_source, calibration_path(self.output)
        n_bytes = sum(each.source.end - each.source.start for each in plan.tensors)
        report = SharedProgress(self.progress, n_bytes)
        if any(each.is_fitted for each in plan.tensors):
            if self.progress is not None and not is_compiled():
                self.progress(ConvertProgress(phase="compile", what="the fit", done_bytes=0, total_bytes=n_bytes))
            fit_kernel()
        wanted = list(plan.checkpoint.shards)
        if plan.origin.is_remote:
            lacking = {each.shard for each in plan.tensors if each.source.name not in journal.finished}
            wanted = [plan.checkpoint.shards[index] for index in sorted(lacking)]
            report.fetched(plan.source_bytes - sum(shard.size_bytes for shard in wanted))
            fetched = plan.checkpoint.shards[0].path.parent
            fetched.mkdir(exist_ok=True)
            if keep:
                keep_small_files(plan, fetched)
        passed = fit_by_passing(plan, calibration, self.progress) if plan.n_fetches > 1 else None
        with plan.origin.shards(wanted, keep=keep, progress=report.fetched) as shards, small_cache():
            fitted = passed or fit_at_once(plan, calibration, self.progress, wanted, shards)
            run_pipeline(plan, folder, journal, shards, report.packed, fitted)


def _done_bytes(plan: Plan, journal: Journal) -> int:
    """Of the source, what the journal has."""
    return sum(each.source.end - each.source.start for each in plan.tensors if each.source.name in journal.finished)


def _n_workers(n: int | None) -> int:
    if n is None:
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(n_cores, _MAX_WORKERS)
    if type(n) is not int or not 1 <= n <= _MAX_WORKERS:
        raise OptionError(f"n_workers is {n!r}, expected a whole number from 1 to {_MAX_WORKERS}.")
    return n
