"""One conversion from a source's folder to a published folder: the whole of journey 1, in its order.

    check -> plan -> [output.partial/: journal.jsonl and model/] -> pack -> read back -> manifest -> rename

Nothing is written before every check has passed. From then on the work lives in the partial folder; the final name
appears by one rename. Whatever ends a run, the same call again continues it and repeats at most one tensor.

Does not: print. The plan and the progress go to the callbacks.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qwq_mlx.convert.check import check_disk, check_output, check_source, partial_path
from qwq_mlx.convert.finish import describe, finish
from qwq_mlx.convert.journal import Journal
from qwq_mlx.convert.memory import peak_memory_bytes
from qwq_mlx.convert.pipeline import Progress, run_pipeline
from qwq_mlx.convert.plan import Plan, make_plan
from qwq_mlx.convert.write import create_shards, disk_fault
from qwq_mlx.errors import ConversionError, OptionError
from qwq_mlx.files.atomic import fsync_folder, publish
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.source import open_checkpoint
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.recipe import load_recipe

__all__ = ["Conversion", "convert_checkpoint"]

_JOURNAL = "journal.jsonl"
_MODEL = "model"
_MAX_WORKERS = 64
_CACHE_BYTES = 256 << 20  # what MLX may keep of freed buffers meanwhile; blocks are of few sizes, so it needs little


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    output: the folder. is_written: False for a dry run. relative_error: of all packed weights together (see
    quant.measure); None for a dry run. resumed_bytes: of source_bytes, what an earlier run had done.
    warnings: what was converted but looks odd, in sentences.
    """

    output: Path
    is_written: bool
    n_tensors: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    relative_error: float | None
    wall_s: float
    peak_memory_bytes: int
    resumed_bytes: int
    warnings: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    recipe: str | Path = DEFAULT_RECIPE,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    n_workers: int | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a checkpoint's folder into packed MLX weights in a new folder.

    recipe: a name under conversions/, or the path of a .toml file. force: replace an existing conversion, once the new
    one is complete. restart: throw an unfinished conversion of this output away instead of continuing it. dry_run: stop
    after the plan. n_workers: threads that pack; None is one per core. on_plan: called once with the plan, before
    anything is written. progress: called after every block.
    Raises OptionError, RecipeError, SourceError, LoadError, ConversionError; see `convert.check` for what is refused.
    """
    started = time.monotonic()
    source, output = Path(source), Path(os.path.abspath(output))  # noqa: PTH100 - a link at the end is not followed
    chosen = load_recipe(recipe)
    checkpoint = open_checkpoint(source)
    check_output(output, source, force=force)
    config = check_source(checkpoint, chosen)
    plan = make_plan(checkpoint, config, chosen, n_workers=_n_workers(n_workers))
    check_disk(plan, output)
    if on_plan is not None:
        on_plan(plan)
    if dry_run:
        return _conversion(plan, output, None, started, resumed_bytes=0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(output):
            check_output(output, source, force=force)  # again: another process may have finished it meanwhile
            return _convert(plan, output, started, force=force, restart=restart, progress=progress)
    except OSError as error:
        raise disk_fault(error, output, plan.output_bytes) from error


def _convert(
    plan: Plan,
    output: Path,
    started: float,
    *,
    force: bool,
    restart: bool,
    progress: Callable[[Progress], None] | None,
) -> Conversion:
    partial = partial_path(output)
    journal = _open_partial(plan, partial, restart=restart)
    resumed = sum(e.source.end - e.source.start for e in plan.tensors if e.source.name in journal.done)
    try:
        with _small_cache():
            run_pipeline(plan, partial / _MODEL, journal, progress)
    finally:
        journal.close()
    run = {"wall_s": round(time.monotonic() - started, 3), "n_workers": plan.n_workers, "resumed_bytes": resumed}
    finish(plan, partial / _MODEL, journal.done, run, progress=progress)
    publish(partial / _MODEL, output, replace=force)
    shutil.rmtree(partial)
    fsync_folder(output.parent)
    return _conversion(plan, output, journal, started, resumed_bytes=resumed)


def _open_partial(plan: Plan, partial: Path, *, restart: bool) -> Journal:
    """Continue the unfinished conversion in `partial`, or lay out a new one."""
    path, model = partial / _JOURNAL, partial / _MODEL
    if os.path.lexists(partial):
        if not partial.is_dir() or {each.name for each in partial.iterdir()} - {_JOURNAL, _MODEL}:
            raise ConversionError(
                f"{partial}: is not an unfinished conversion, but has the name of one. "
                "Move it away, or choose another output."
            )
        if path.is_file() and model.is_dir() and not restart:
            journal = Journal.resume(path, describe(plan))
            if journal is not None:
                return journal
        shutil.rmtree(partial)
    model.mkdir(parents=True)
    create_shards(plan, model)
    journal = Journal.create(path, describe(plan))
    fsync_folder(partial)
    fsync_folder(partial.parent)
    return journal


def _conversion(plan: Plan, output: Path, journal: Journal | None, started: float, *, resumed_bytes: int) -> Conversion:
    done = [] if journal is None else [journal.done[each.source.name] for each in plan.tensors]
    error2, weight2 = sum(each.error2 for each in done), sum(each.weight2 for each in done)
    return Conversion(
        output=output,
        is_written=journal is not None,
        n_tensors=len(plan.tensors),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        relative_error=math.sqrt(error2 / weight2) if weight2 else None,
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
        if tensor.packing is not None and done.weight2 == 0:
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


@contextmanager
def _small_cache() -> Iterator[None]:
    """Bound what MLX keeps of freed memory, and put the caller's limit back."""
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
