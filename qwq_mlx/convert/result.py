"""What a conversion did, as a value.

Does not: print it (`plan_text` makes text of it).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.convert.journal import FinishedTensor
from qwq_mlx.convert.plan import Plan, PlannedTensor
from qwq_mlx.convert.source_warnings import source_warnings
from qwq_mlx.model.process_memory import peak_memory_bytes
from qwq_mlx.quant.packing import Packing

__all__ = ["MAX_UNLIKE", "Conversion", "conversion_of"]

MAX_UNLIKE = 2.0
"""A matrix whose error is this many times the median of those packed alike, or that part of it, is warned of."""

_MIN_ALIKE = 5  # of fewer the median says little


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    output: the folder.
    is_written: False for a dry run.
    n_tensors: tensors of the source.
    source_bytes: of the source's tensors.
    output_bytes: of the output, but for its manifest and report.
    bits_per_weight: of all weights together.
    relative_error: of all packed weights together (see quant.rounding_error); None for a dry run.
    kl: to the source, in nats a token; None where that was not measured.
    top1_agreement: share of tokens with the source's first choice; None where that was not measured.
    logprob_loss: how much less likely the text became, in nats a token; None where that was not measured.
    wall_s: of the whole run.
    peak_memory_bytes: of the process.
    resumed_bytes: of source_bytes, what an earlier run had done.
    warnings: what was converted but looks odd, in sentences.

    >>> done = qwq_mlx.convert_checkpoint(FOLDER, "pocket-2bit", recipe="2bit", dry_run=True)
    >>> done.is_written, done.n_tensors, round(done.bits_per_weight, 2)
    (False, 99, 2.52)
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
    logprob_loss: float | None
    wall_s: float
    peak_memory_bytes: int
    resumed_bytes: int
    warnings: tuple[str, ...]


def conversion_of(
    plan: Plan,
    output: Path,
    finished: Mapping[str, FinishedTensor] | None,
    started: float,
    *,
    quality: Mapping[str, Any] | None = None,
    resumed_bytes: int = 0,
) -> Conversion:
    """finished: every tensor's record, or None for a dry run. started: time.monotonic() of the run's begin.

    quality: as the manifest has it.
    """
    measured = quality or {}
    packed = [each.source.name for each in plan.tensors if each.packing is not None]
    records = [] if finished is None else [finished[name] for name in packed]
    error2, weight2 = sum(each.error2 for each in records), sum(each.weight2 for each in records)
    return Conversion(
        output=output,
        is_written=finished is not None,
        n_tensors=len(plan.tensors),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        relative_error=math.sqrt(error2 / weight2) if weight2 else None,
        kl=measured.get("kl"),
        top1_agreement=measured.get("top1_agreement"),
        logprob_loss=None if quality is None else math.log(quality["perplexity"] / quality["reference_perplexity"]),
        wall_s=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
        resumed_bytes=resumed_bytes,
        warnings=(
            *source_warnings(plan.checkpoint, chat_template=plan.chat_template),
            *(() if finished is None else _warnings(plan, finished)),
        ),
    )


def _warnings(plan: Plan, records: Mapping[str, FinishedTensor]) -> list[str]:
    warnings = []
    for tensor in plan.tensors:
        record, path = records[tensor.source.name], plan.checkpoint.shards[tensor.shard].path.name
        if record.weight2 == 0:
            warnings.append(
                f"{path}: every weight of {record.name} is zero. Compare the shard's sha256 with the source's."
            )
        elif record.zero_pages:
            warnings.append(
                f"{path}: {record.name} has {record.zero_pages:,} pages (4,096 bytes) of zeros, as lost writes leave "
                "them. Compare the shard's sha256 with the source's."
            )
    return [*warnings, *_unlike(plan, records)]


def _unlike(plan: Plan, records: Mapping[str, FinishedTensor]) -> list[str]:
    """Matrices whose error is as unlike that of the others packed alike as if they had a bit more or less.

    A bit halves the error. In a trained model the largest is 1.6 times the median (the pocket, in 15 recipes).
    """
    alike: dict[Packing, dict[PlannedTensor, float]] = {}
    for tensor in plan.tensors:
        record = records[tensor.source.name]
        if tensor.packing is not None and record.weight2 and not tensor.is_repacked:
            alike.setdefault(tensor.packing, {})[tensor] = math.sqrt(record.error2 / record.weight2)
    warnings = []
    for errors in alike.values():
        middle = statistics.median(errors.values())
        if len(errors) < _MIN_ALIKE or not middle:
            continue
        warnings += [
            f"{plan.checkpoint.shards[tensor.shard].path.name}: rounding cost {tensor.source.name} {100 * error:.3g} % "
            f"of its size, the median of {len(errors):,} matrices packed alike is {100 * middle:.3g} %. Weights far "
            "larger than the rest, as a flipped bit leaves them, look like that. Compare the shard's sha256 with the "
            "source's."
            for tensor, error in errors.items()
            if not middle / MAX_UNLIKE <= error <= middle * MAX_UNLIKE
        ]
    return warnings
