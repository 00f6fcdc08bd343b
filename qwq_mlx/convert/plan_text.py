"""A plan and a result as text for a person. GB is 1e9 bytes.

Does not: print.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qwq_mlx.files.gguf.checkpoint import types_text
from qwq_mlx.model.tensor_types import FLOAT_TYPES

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.result import Conversion

__all__ = ["duration_text", "plan_text", "result_text", "size_text"]


def size_text(n_bytes: float) -> str:
    """18436543210 -> '18.44 GB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes:.0f} bytes"


def duration_text(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plan_text(plan: Plan, output: str, free_bytes: int) -> str:
    """What a run will do, one line per question a user has."""
    checkpoint, origin = plan.checkpoint, plan.origin
    place = f"{origin.repository} at {origin.commit}" if origin.repository else str(checkpoint.folder)
    types = max(entry.dtype for _, entry in checkpoint.tensors.values())
    if checkpoint.gguf is not None:
        place = f"{checkpoint.gguf.label} ({checkpoint.gguf.name})"
        types = types_text(entry for _, entry in checkpoint.tensors.values())
    recipe, packing, text = plan.recipe, plan.recipe.packing, plan.calibration
    overrides = f", {len(recipe.overrides)} overrides ({_widths(plan)})" if recipe.overrides else ""
    calibrated = "" if text is None else f" by {text.n_ids:,} tokens of {text.name}"
    twice = ""
    if plan.n_fetches > 1:
        twice = f"; the source is fetched twice, to calibrate and to pack ({size_text(plan.source_bytes)} each)"
    rows = {
        "source": f"{place}: {len(checkpoint.shards)} shards, {len(plan.tensors):,} tensors, "
        f"{plan.n_weights:,} weights in {types}, {size_text(plan.source_bytes)}",
        "recipe": f"{recipe.name}: {packing.mode}, {packing.bits} bits, groups of {packing.group_size}, "
        f"{plan.fit}{overrides}{calibrated}",
        "output": f"{output}: {len(plan.shards)} shards, {size_text(plan.output_bytes)}, "
        f"{plan.bits_per_weight:.3f} bits per weight",
        "quality": plan.quality_note,
        "memory": f"about {size_text(plan.peak_memory_bytes)} at peak, with {plan.n_workers} workers",
        "disk": f"{size_text(plan.output_bytes + plan.calibration_bytes + plan.fetched_bytes)} at peak"
        f"{'' if origin.is_remote else ' beside the source'}, {size_text(free_bytes)} free{twice}",
    }
    if checkpoint.gguf is not None:
        rows["gguf"] = _gguf_text(plan)
    if text is not None:
        from qwq_mlx.convert.calibration.estimate import estimate_calibration_s

        seconds = duration_text(estimate_calibration_s(plan))
        rows["time"] = f"about {seconds} to calibrate, before anything is packed (an estimate from a moment's work)"
    return "\n".join(f"{name:<8}{row}" for name, row in rows.items())


def _gguf_text(plan: Plan) -> str:
    """Which matrices of a GGUF keep their codes, and which are fitted anew to how many bits."""
    matrices = [each for each in plan.tensors if each.packing is not None]
    same = [each for each in matrices if each.is_repacked]
    anew = Counter(
        f"{each.source.dtype} to {each.packing.bits} bits" for each in matrices if each.packing and not each.is_repacked
    )
    kept = ", ".join(f"{n} of {dtype}" for dtype, n in Counter(each.source.dtype for each in same).most_common())
    parts = [f"{len(same)} matrices keep their codes ({kept})"] if same else []
    if anew:
        fitted = ", ".join(f"{n} of {how}" for how, n in anew.most_common())
        parts.append(f"{sum(anew.values())} are fitted anew ({fitted})")
    assert plan.scale_dtype is not None  # of a GGUF it is one of three
    return f"{', '.join(parts)}; scales in {FLOAT_TYPES[plan.scale_dtype]}"


def _widths(plan: Plan) -> str:
    """Matrices by width: "9 in 5 bits, 39 in 4 bits, 1 as they are"."""
    counts = Counter(each.packing.bits if each.packing else 0 for each in plan.tensors if len(each.source.shape) == 2)
    parts = [f"{n} in {bits} bits" if bits else f"{n} as they are" for bits, n in sorted(counts.items(), reverse=True)]
    return ", ".join(parts)


def result_text(conversion: Conversion) -> str:
    """What a conversion did, in two or three lines."""
    if not conversion.is_written:
        return "dry run: nothing was written"
    error = "" if conversion.relative_error is None else f", relative error {100 * conversion.relative_error:.2f} %"
    resumed = f", {size_text(conversion.resumed_bytes)} of it before" if conversion.resumed_bytes else ""
    rate = (conversion.source_bytes - conversion.resumed_bytes) / max(conversion.wall_s, 1e-9)
    lines = [
        f"done: {conversion.output}: {conversion.n_tensors:,} tensors, {size_text(conversion.output_bytes)}, "
        f"{conversion.bits_per_weight:.3f} bits per weight{error}",
        f"      {size_text(conversion.source_bytes)} read{resumed} in {duration_text(conversion.wall_s)} "
        f"({size_text(rate)}/s), peak memory {size_text(conversion.peak_memory_bytes)}",
    ]
    kl, agreement, loss = conversion.kl, conversion.top1_agreement, conversion.logprob_loss
    if kl is not None and agreement is not None and loss is not None:
        lines.append(
            f"      quality: KL {kl:.4g} nats a token, {100 * agreement:.2f} % same most likely token, "
            f"log-probability of the text {-loss:+.4f} nats a token; see {conversion.output / 'report.html'}"
        )
    return "\n".join(lines)
