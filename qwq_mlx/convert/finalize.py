"""After the last tensor: the small files, everything read back, and the manifest that says what the folder is.

Reading back compares each output tensor with the digest taken while it was packed, so what the manifest vouches for is
what lies on the disk; and the safetensors package must find the same tensors in it, since loaders use that.

Does not: publish the folder (the job does).
"""

from __future__ import annotations

import hashlib
import math
import platform
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwq_mlx.convert.calibration.text import Calibration
from qwq_mlx.convert.journal import FinishedTensor
from qwq_mlx.convert.plan import BLOCK_BYTES, TEMPLATE_NAME, Plan
from qwq_mlx.convert.progress import ConvertProgress
from qwq_mlx.errors import ConversionError, SourceError, system_said
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.checkpoint import CONFIG_NAME, INDEX_NAME
from qwq_mlx.files.digest import ShardDigest
from qwq_mlx.files.manifest import (
    FileRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
    record_file,
    write_manifest,
)
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.process_memory import peak_memory_bytes
from qwq_mlx.model.upstream import package_version
from qwq_mlx.quality.report import REPORT_NAME, ReportFacts, report_page
from qwq_mlx.quality.result import Quality
from qwq_mlx.quant.error_feedback import DAMPING

__all__ = ["check_source_digest", "describe", "finish", "keep_small_files", "write_small_files"]


def describe(plan: Plan) -> dict[str, Any]:
    """What decides the bytes of a conversion: the journal's first line, so that two conversions are never mixed."""
    checkpoint = plan.checkpoint
    return {
        "format": 3,
        "repository": plan.origin.repository,
        "commit": plan.origin.commit,
        "shards": {shard.path.name: shard.size_bytes for shard in checkpoint.shards},
        "files": {
            name: hashlib.sha256(data).hexdigest() for name, data in {**_small_files(plan), **_given(plan)}.items()
        },
        "layout": {shard.name: hashlib.sha256(shard.head).hexdigest() for shard in plan.shards},
        "recipe": plan.recipe.text,
        "calibration": None if plan.calibration is None else _calibration(plan.calibration),
        "block_bytes": BLOCK_BYTES,
        "versions": _versions(),
    }


def _calibration(text: Calibration) -> dict[str, Any]:
    """A GPU and the CPU round the text's activations otherwise, and fit by other sums."""
    return {**text.as_mapping(), "backend": backend_name(), "damping": DAMPING, "is_toward_float": text.is_toward_float}


def write_small_files(plan: Plan, folder: Path) -> None:
    """Write config, index and the copied files beside the finished shards, so that the folder is a model. OSError."""
    copied = {name: data for name, data in _small_files(plan).items() if name in plan.copied}
    made = {**_given(plan), CONFIG_NAME: plan.config_json, INDEX_NAME: plan.index_json}
    for name, data in {**copied, **made}.items():
        write_file(folder / name, data)


def finish(
    plan: Plan,
    folder: Path,
    records: Mapping[str, FinishedTensor],
    run: Mapping[str, float],
    *,
    quality: Quality | None,
    progress: Callable[[ConvertProgress], None] | None,
) -> Manifest:
    """Check everything in `folder` against `done` and write manifest.json, and report.html where quality was measured.

    Raises ConversionError naming a tensor whose bytes on the disk are not those that were packed; OSError.
    """
    small, tensors = _small_files(plan), _tensor_records(plan, records)
    if quality is not None:
        write_file(folder / REPORT_NAME, report_page(_report_facts(plan, tensors), quality).encode())
    others = [] if quality is None else [REPORT_NAME]
    others += _given(plan)
    files, digests = _read_back(plan, folder, others, progress)
    _check_tensors(plan, folder, digests, records)
    _check_with_reference(plan, folder)
    manifest = Manifest(
        source=_source_record(plan, small, records),
        recipe=plan.recipe.as_mapping(),
        fit=plan.fit,
        calibration=None if plan.calibration is None else plan.calibration.as_mapping(),
        versions=_versions() | {"python": platform.python_version()},
        files=files,
        tensors=tensors,
        run={**run, "peak_memory_bytes": peak_memory_bytes()},
        quality=None if quality is None else quality.as_mapping(),
        gguf=_gguf_record(plan),
    )
    write_manifest(folder, manifest)
    return manifest


def check_source_digest(plan: Plan, records: Mapping[str, FinishedTensor]) -> None:
    """Compare a file with the digest that its store gave it, once all of it has been read. Raises SourceError."""
    facts = plan.checkpoint.gguf
    if facts is None or facts.sha256 is None:
        return
    sha256 = records[plan.tensors[-1].source.name].source_sha256
    if sha256 != facts.sha256:
        raise SourceError(
            f"{facts.label}: {facts.path} has the sha256 {sha256[:12]}…, its name says {facts.sha256[:12]}…. The file "
            "is damaged, and nothing was published; pull it again, then convert with `restart=True`."
        )


def keep_small_files(plan: Plan, folder: Path) -> None:
    """Put config, index and copied files beside fetched shards, so that the folder is a checkpoint. Raises OSError."""
    for name, data in _small_files(plan).items():
        write_file(folder / name, data)


def _small_files(plan: Plan) -> dict[str, bytes]:
    """The source's files that are taken over or decide something: config, index, and the copied ones."""
    folder = plan.checkpoint.folder
    names = [CONFIG_NAME, *([INDEX_NAME] if (folder / INDEX_NAME).exists() else []), *plan.copied]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise SourceError(
            f"{error.filename}: cannot be read {system_said(error, 'Check the source and run again.')}"
        ) from error


def _given(plan: Plan) -> dict[str, bytes]:
    """The chat template that the caller gave for the conversion, as its file."""
    return {} if plan.chat_template is None else {TEMPLATE_NAME: plan.chat_template.encode()}


def _read_back(
    plan: Plan, folder: Path, others: list[str], progress: Callable[[ConvertProgress], None] | None
) -> tuple[dict[str, FileRecord], dict[str, ShardDigest]]:
    """Size and digests of every file of the folder, shards in parallel. others: names besides the plan's."""
    total, done_bytes, lock = sum(shard.size_bytes for shard in plan.shards), 0, threading.Lock()

    def advance(n_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += n_bytes
            if progress is not None:
                progress(
                    ConvertProgress(phase="check", what=str(folder.name), done_bytes=done_bytes, total_bytes=total)
                )

    names = sorted([CONFIG_NAME, INDEX_NAME, *others, *plan.copied, *(shard.name for shard in plan.shards)])
    shard_names = {shard.name for shard in plan.shards}
    with ThreadPoolExecutor(plan.n_workers) as pool:
        jobs = [pool.submit(record_file, folder / name, advance if name in shard_names else None) for name in names]
        recorded = {name: job.result() for name, job in zip(names, jobs, strict=True)}
    digests = {name: digest for name, (_, digest) in recorded.items() if digest is not None}
    return {name: record for name, (record, _) in recorded.items()}, digests


def _check_tensors(
    plan: Plan, folder: Path, digests: Mapping[str, ShardDigest], records: Mapping[str, FinishedTensor]
) -> None:
    wrong = [
        output.entry.name
        for tensor in plan.tensors
        for output, sha256 in zip(tensor.outputs, records[tensor.source.name].sha256, strict=True)
        if digests[plan.shards[output.shard].name].tensors[output.entry.name] != sha256
    ]
    if wrong:
        raise ConversionError(
            f"{folder}: {len(wrong):,} tensors read back are not what was written: {', '.join(wrong[:10])}. "
            "The disk or the memory is failing; begin again with `restart=True`, on another disk if it happens twice."
        )


def _check_with_reference(plan: Plan, folder: Path) -> None:
    """Raises ConversionError for a shard in which the safetensors package does not find what the plan put there."""
    expected: dict[str, set[str]] = {shard.name: set() for shard in plan.shards}
    for tensor in plan.tensors:
        for output in tensor.outputs:
            expected[plan.shards[output.shard].name].add(output.entry.name)
    for name, tensors in expected.items():
        try:
            with safe_open(folder / name, framework="np") as file:
                problem = "" if set(file.keys()) == tensors else "finds other tensors in it"
        except SafetensorError as error:
            problem = f"cannot read it ({error})"
        if problem:
            raise ConversionError(
                f"{folder / name}: the safetensors package {problem}, though its bytes are those that were written. "
                "This is a fault of qwq_mlx: report it with the recipe, and keep the source."
            )


def _tensor_records(plan: Plan, finished: Mapping[str, FinishedTensor]) -> dict[str, TensorRecord]:
    records = {}
    for tensor in plan.tensors:
        record = finished[tensor.source.name]
        error = math.sqrt(record.error2 / record.weight2) if record.weight2 else 0.0
        for place, (output, sha256) in enumerate(zip(tensor.outputs, record.sha256, strict=True)):
            records[output.entry.name] = TensorRecord(
                shard=plan.shards[output.shard].name,
                dtype=output.entry.dtype,
                shape=output.entry.shape,
                sha256=sha256,
                relative_error=float(f"{error:.6g}") if tensor.is_rounded and place == 0 else None,
            )
    return records


def _report_facts(plan: Plan, tensors: Mapping[str, TensorRecord]) -> ReportFacts:
    origin = plan.origin
    return ReportFacts(
        title=plan.recipe.name,
        source=f"{origin.repository} at {origin.commit}" if origin.repository else plan.checkpoint.folder.name,
        recipe=plan.recipe.text,
        n_weights=plan.n_weights,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        tensor_errors={name: each.relative_error for name, each in tensors.items() if each.relative_error is not None},
        versions=_versions(),
    )


def _source_record(plan: Plan, small: Mapping[str, bytes], records: Mapping[str, FinishedTensor]) -> SourceRecord:
    read = {} if plan.checkpoint.gguf is not None else small  # of a GGUF these are made from its metadata
    files = {
        name: FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in read.items()
    }
    for index, shard in enumerate(plan.checkpoint.shards):
        last = [tensor for tensor in plan.tensors if tensor.shard == index][-1]
        files[shard.path.name] = FileRecord(size_bytes=shard.size_bytes, sha256=records[last.source.name].source_sha256)
    return SourceRecord(repository=plan.origin.repository, commit=plan.origin.commit, files=files)


def _gguf_record(plan: Plan) -> dict[str, Any] | None:
    """What a manifest says of a GGUF and of what became of its tensors; None for any other source."""
    facts = plan.checkpoint.gguf
    if facts is None:
        return None
    return {
        "label": facts.label,
        "name": facts.name,
        "scale_dtype": plan.scale_dtype,
        "tensors": {
            tensor.source.name: {"type": tensor.source.dtype, "is_repacked": tensor.is_repacked}
            for tensor in plan.tensors
        },
    }


def _versions() -> dict[str, str]:
    """Of the packages that decide the bytes."""
    return {name: package_version(name) for name in ("qwq_mlx", "mlx", "numpy")}
