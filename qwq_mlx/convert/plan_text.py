"""A plan, a progress and a result as text for a person. GB is 1e9 bytes.

Does not: print.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwq_mlx.convert.plan import Plan
    from qwq_mlx.convert.progress import Progress
    from qwq_mlx.convert.result import Conversion

__all__ = ["ProgressLine", "duration_text", "plan_text", "result_text", "size_text"]

_PHASES = {
    "calibrate": "calibrating",
    "convert": "converting",
    "check": "reading back",
    "quality": "measuring",
}
_TERMINAL_S, _FILE_S = 0.1, 10.0  # between two lines: on a terminal, where one replaces the other, and in a file


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
    dtype = max(entry.dtype for _, entry in checkpoint.tensors.values())
    recipe, packing, text = plan.recipe, plan.recipe.packing, plan.calibration
    overrides = f", {len(recipe.overrides)} overrides ({_widths(plan)})" if recipe.overrides else ""
    calibrated = "" if text is None else f" by {text.n_ids:,} tokens of {text.name}"
    twice = ""
    if plan.n_fetches > 1:
        twice = f"; the source is fetched twice, to calibrate and to pack ({size_text(plan.source_bytes)} each)"
    rows = {
        "source": f"{place}: {len(checkpoint.shards)} shards, {len(plan.tensors):,} tensors, "
        f"{plan.n_weights:,} weights in {dtype}, {size_text(plan.source_bytes)}",
        "recipe": f"{recipe.name}: {packing.mode}, {packing.bits} bits, groups of {packing.group_size}, "
        f"{plan.fit}{overrides}{calibrated}",
        "output": f"{output}: {len(plan.shards)} shards, {size_text(plan.output_bytes)}, "
        f"{plan.bits_per_weight:.3f} bits per weight",
        "quality": plan.quality_note,
        "memory": f"about {size_text(plan.peak_memory_bytes)} at peak, with {plan.n_workers} workers",
        "disk": f"{size_text(plan.output_bytes + plan.fetched_bytes)} at peak"
        f"{'' if origin.is_remote else ' beside the source'}, {size_text(free_bytes)} free{twice}",
    }
    return "\n".join(f"{name:<8}{row}" for name, row in rows.items())


def _widths(plan: Plan) -> str:
    """Matrices by width: "9 in 5 bits, 39 in 4 bits, 1 as they are"."""
    counts = Counter(each.packing.bits if each.packing else 0 for each in plan.tensors if len(each.source.shape) == 2)
    parts = [f"{n} in {bits} bits" if bits else f"{n} as they are" for bits, n in sorted(counts.items(), reverse=True)]
    return ", ".join(parts)


def result_text(conversion: Conversion) -> str:
    """What a conversion did, in one or two lines, and its warnings."""
    lines = [f"warning: {each}" for each in conversion.warnings]
    if not conversion.is_written:
        return "\n".join([*lines, "dry run: nothing was written"])
    error = "" if conversion.relative_error is None else f", relative error {100 * conversion.relative_error:.2f} %"
    resumed = f", {size_text(conversion.resumed_bytes)} of it before" if conversion.resumed_bytes else ""
    rate = (conversion.source_bytes - conversion.resumed_bytes) / max(conversion.wall_s, 1e-9)
    lines.append(
        f"done: {conversion.output}: {conversion.n_tensors:,} tensors, {size_text(conversion.output_bytes)}, "
        f"{conversion.bits_per_weight:.3f} bits per weight{error}"
    )
    lines.append(
        f"      {size_text(conversion.source_bytes)} read{resumed} in {duration_text(conversion.wall_s)} "
        f"({size_text(rate)}/s), peak memory {size_text(conversion.peak_memory_bytes)}"
    )
    if conversion.kl is not None and conversion.top1_agreement is not None:
        lines.append(
            f"      quality: KL {conversion.kl:.4g} nats a token, {100 * conversion.top1_agreement:.2f} % same most "
            f"likely token; see {conversion.output / 'report.html'}"
        )
    return "\n".join(lines)


class ProgressLine:
    """Progress values to lines: what is done of what, how fast, what remains, which tensor.

    On a terminal a line is due ten times a second, in a file every ten seconds.
    """

    def __init__(self, *, is_terminal: bool) -> None:
        self._every_s = _TERMINAL_S if is_terminal else _FILE_S
        self._phase = ""
        self._started = self._last = time.monotonic()

    def update(self, progress: Progress) -> str | None:
        """The line to show now, or None where the last one is fresh."""
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._started, self._last = progress.phase, now, now
            return None
        if progress.done_bytes == progress.resumed_bytes:
            self._started = now  # waiting for the first shard does not count
        if now - self._last < self._every_s:
            return None
        self._last = now
        return self.line(progress, now - self._started)

    @staticmethod
    def line(progress: Progress, elapsed_s: float) -> str:
        """The line for a phase that has run `elapsed_s` seconds."""
        rate = (progress.done_bytes - progress.resumed_bytes) / max(elapsed_s, 1e-9)
        left = duration_text((progress.total_bytes - progress.done_bytes) / rate) if rate > 0 else "?"
        share = 100 * progress.done_bytes / max(progress.total_bytes, 1)
        fetched = "" if progress.fetched_bytes is None else f"  {size_text(progress.fetched_bytes)} fetched"
        return (
            f"{_PHASES.get(progress.phase, progress.phase)} {share:3.0f} %  "
            f"{size_text(progress.done_bytes)} of {size_text(progress.total_bytes)}{fetched}  {size_text(rate)}/s  "
            f"{left} left  {progress.what}"
        )
