"""Rows of the bundled model that attend in a batch beside the same rows alone, on this backend.

Does not: measure what rows cost (`speed` does).
"""

from __future__ import annotations

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.engine.kv_cache import grow, new_cache
from qwq_mlx.engine.model_runner import run_pass
from qwq_mlx.model.upstream import import_mlx

__all__ = ["check_rows"]

_LENGTHS = (5, 5, 9, 40)  # two alike and two not: with one length the rows attend without a mask
_FED = (*[(1, 1, 1, 1)] * 3, (3, 3, 3, 3), (1, 4, 2, 3))  # ids of each row in a pass: several, where drafts are checked
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def check_rows(subject: Subject) -> Result:
    """The logits of every row in the batch are those of the row alone, within the tolerance of the compute type."""
    mx = import_mlx()
    model = subject.pocket
    tolerance = _TOLERANCE[model.compute_type]
    together, alone = ([new_cache(model.module) for _ in _LENGTHS] for _ in range(2))
    for caches in (together, alone):
        for cache, length in zip(caches, _LENGTHS, strict=True):
            mx.eval(model.module(mx.array([[(7 * place + length) % 256 for place in range(length)]]), cache=cache))
    worst, n_same, n_all = 0.0, 0, 0
    for step, n_fed in enumerate(_FED):
        fed = [[(31 * row + 7 * place + step) % 256 for place in range(n)] for row, n in enumerate(n_fed)]
        for caches in (together, alone):
            for cache, ids in zip(caches, fed, strict=True):
                grow(cache, len(ids))
        flat = mx.array([[token_id] for ids in fed for token_id in ids])
        found = run_pass(model.module, flat, together, n_fed, batches_from=1)
        for cache, ids in zip(alone, fed, strict=True):
            expected = model.module(mx.array([ids]), cache=cache)[0]
            own, found = found[: len(ids), 0], found[len(ids) :]
            off = mx.abs(own - expected).max() / mx.abs(expected).max()
            worst = max(worst, float(off.item()))
            n_same += bool(mx.array_equal(own, expected).item())
            n_all += 1
    return Result(
        outcome="ok" if worst <= tolerance else "failed",
        found=f"off by {worst:.1e} of the largest logit, {n_same} of {n_all} to the bit",
        expected=f"at most {tolerance:.0e} ({model.compute_type})",
        values={"error": worst, "same": n_same, "of": n_all},
    )
