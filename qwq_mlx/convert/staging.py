"""The folder beside an output that an unfinished conversion lives in: begun, continued, and gone when it is published.

    output.partial/  journal.jsonl   what is done (`journal`)
                     model/          the output shards; renamed to the output in the end
                     source/         shards that are fetched
                     calibration/    what a calibration pass fitted, and how far it came

A kill between publishing and removing it leaves it without model/, or with the folder that was replaced in its place:
the same call then knows the output for its own.

Does not: lock the output, or write a weight.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qwq_mlx.convert.finalize import describe
from qwq_mlx.convert.journal import Journal, differences, read_description
from qwq_mlx.convert.plan import Plan
from qwq_mlx.convert.preflight import partial_path
from qwq_mlx.convert.write import create_shards
from qwq_mlx.errors import ConversionError, SourceError
from qwq_mlx.files.atomic import fsync_folder, replaced_path
from qwq_mlx.files.manifest import check_sizes

__all__ = [
    "MODEL",
    "SOURCE",
    "calibration_path",
    "is_marked",
    "open_partial",
    "published",
    "remove_partial",
    "unfinished_source",
]

MODEL = "model"
SOURCE = "source"
_JOURNAL = "journal.jsonl"
_CALIBRATION = "calibration"


def unfinished_source(output: Path) -> tuple[str, str] | None:
    """Repository and commit that an unfinished conversion of this output is made from."""
    description = read_description(partial_path(output) / _JOURNAL)
    repository, commit = description.get("repository"), description.get("commit")
    return (repository, commit) if isinstance(repository, str) and isinstance(commit, str) else None


def is_marked(output: Path) -> bool:
    """Whether the output may be one that `published` knows."""
    return output.is_dir() and (partial_path(output) / _JOURNAL).is_file()


def published(plan: Plan, output: Path) -> Journal | None:
    """The journal of an output that this very conversion has published, and was stopped right after; else None."""
    path = partial_path(output) / _JOURNAL
    if not is_marked(output) or differences(read_description(path), describe(plan)):
        return None
    if (journal := Journal.resume(path, describe(plan))) is None:
        return None
    journal.close()
    try:
        digests = {name: record.sha256 for name, record in check_sizes(output).tensors.items()}
    except SourceError:
        return None  # not whole, so not ours; force replaces it
    made = {
        output.entry.name: sha256
        for tensor in plan.tensors
        if (finished := journal.finished.get(tensor.source.name)) is not None
        for output, sha256 in zip(tensor.outputs, finished.sha256, strict=True)
    }
    return journal if made == digests else None


def open_partial(plan: Plan, output: Path, *, restart: bool) -> Journal:
    """Continue the unfinished conversion, or lay out a new one.

    Raises ConversionError for a folder of that name that is none, or is one of something else; OSError.
    """
    partial = partial_path(output)
    path, model = partial / _JOURNAL, partial / MODEL
    if os.path.lexists(partial):
        known = {_JOURNAL, MODEL, SOURCE, _CALIBRATION}
        if not partial.is_dir() or {each.name for each in partial.iterdir()} - known:
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


def calibration_path(output: Path) -> Path:
    """Where the calibration pass keeps what it fitted until the output has it."""
    return partial_path(output) / _CALIBRATION


def remove_partial(output: Path) -> None:
    """Remove the folder of a published conversion, and what it replaced. Raises OSError."""
    model, old = partial_path(output) / MODEL, replaced_path(output)
    if model.exists():  # the folder that was replaced, where a kill came before it was moved away
        model.rename(old)
    if old.exists():
        shutil.rmtree(old)
    shutil.rmtree(partial_path(output))
    fsync_folder(output.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
