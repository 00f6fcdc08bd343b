"""Every place of code and docs that says "not measured on Metal": which check measures it here, or why none can.

A new such place needs a line here (tests/doctor holds it), so that a report from a Mac answers all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwq_mlx.doctor.check import Result
from qwq_mlx.model.memory.plan import Backend

__all__ = ["CLAIMS", "Claim", "judge_claims"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement that nobody has tried on Metal.

    files: where it stands, from the checkout's root. text: in short. checks: that measure it; () with the reason why
      none does.
    """

    files: tuple[str, ...]
    text: str
    checks: tuple[str, ...] = ()
    reason: str = ""


CLAIMS = (
    Claim(
        files=("qwq_mlx/model/load.py",),
        text="bfloat16 is the faster compute type on a GPU",
        checks=("products",),
    ),
    Claim(
        files=("qwq_mlx/model/device.py",),
        text="a run's bytes are wired and the old limit is put back",
        checks=("wired limit", "memory"),
    ),
    Claim(
        files=("qwq_mlx/model/memory/activations.py",),
        text="what a pass holds beside weights and cache",
        checks=("memory plan",),
    ),
    Claim(
        files=(
            "README.md",
            "docs/cli.md",
            "docs/recipes.md",
            "qwq_mlx/fit/__main__.py",
            "qwq_mlx/model/memory/plan.py",
        ),
        text="the recommended working set of a Mac: two thirds of its memory up to 32 GiB, three quarters above",
        checks=("working set",),
    ),
    Claim(
        files=("docs/benchmarks.md",),
        text="codes of 3, 5 and 6 bits may decode slower than 4",
        checks=("products",),
    ),
    Claim(
        files=("docs/benchmarks.md",),
        text="answers and numbers are those of the CPU",
        checks=("recorded ids", "attention"),
    ),
    Claim(
        files=("qwq_mlx/convert/calibration/estimate.py",),
        text="the time of a calibrated conversion",
        reason="takes minutes to hours: python -m qwq_mlx.convert --calibrate TEXT plans it and shows what it took",
    ),
    Claim(
        files=("qwq_mlx/files/read_ahead.py",),
        text="macOS reads shards ahead when it is advised to",
        reason="shows only where nothing of the model is in the file cache: after a restart of the Mac",
    ),
    Claim(
        files=("docs/benchmarks.md",),
        text="decode speed beside mlx-lm's",
        reason="takes minutes: python -m qwq_mlx.bench measures it",
    ),
    Claim(
        files=("qwq_mlx/model/batched_cache.py",),
        text="rows that attend in a batch are those alone, and cost less together",
        checks=("rows together", "row costs"),
    ),
    Claim(
        files=("qwq_mlx/quality/estimate.py",),
        text="how long a conversion's quality step takes",
        reason="needs a conversion of minutes to hours: python -m qwq_mlx.convert says estimate and time",
    ),
)


def judge_claims(backend: Backend, results: Sequence[Result]) -> list[Result]:
    """One result a claim, named by its text: that of the worst of its checks, or "not checkable" with the reason."""
    by_name = {result.name: result for result in results}
    return [_judged(claim, backend, [by_name[name] for name in claim.checks]) for claim in CLAIMS]


def _judged(claim: Claim, backend: Backend, results: Sequence[Result]) -> Result:
    values = {"files": list(claim.files), "checks": list(claim.checks)}
    if backend != "metal":
        return Result(name=claim.text, outcome="not checkable", found=f"this is {backend}, not Metal", values=values)
    if not results:
        return Result(name=claim.text, outcome="not checkable", found=claim.reason, values=values)
    order = ("failed", "not checkable", "not measured", "ok")
    worst = min(results, key=lambda result: order.index(result.outcome))
    return Result(name=claim.text, outcome=worst.outcome, found=f"see {', '.join(claim.checks)}", values=values)
