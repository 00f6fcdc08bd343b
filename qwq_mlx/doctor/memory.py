"""The memory plan beside the measured peak: the bundled model over 512 positions, by every kind of cache it can have.

Does not: measure the whole process; MLX's own count is what the plan is about.
"""

from __future__ import annotations

import gc

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.memory.activations import unpacked_bytes
from qwq_mlx.model.memory.plan import Workload, can_quantize, plan_memory
from qwq_mlx.model.memory.workload import FLOAT_BYTES
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.options import NEUTRAL, Sampling

__all__ = ["BOUNDS", "check_memory_plan", "measured_peak"]

BOUNDS = (0.9, 1.1)
"""Planned over measured bytes."""

_CONTEXT = 512
_STEP = 128
_N_TOKENS = 4


def check_memory_plan(subject: Subject) -> Result:
    """Planned over measured peak is within the bounds, for a plain cache and for quantized ones where there are any."""
    files = open_model_folder(subject.pocket_folder)
    # so small a layer is over before MLX has let go of the matrices that the one before was unpacked to
    late = unpacked_bytes(files.config, FLOAT_BYTES["bfloat16"]) if subject.backend == "cuda" else 0
    ratios, is_near = {}, True
    for kv_bits in (None, 8, 4):
        if kv_bits is not None and not can_quantize(files.config, subject.backend):
            continue
        workload = Workload(context=_CONTEXT, kv_bits=kv_bits, prefill_step=_STEP)
        plan = plan_memory(files, workload, backend=subject.backend)
        measured = measured_peak(subject, workload)
        ratios[f"cache of {kv_bits or 'all'} bits"] = plan.peak_bytes / measured
        is_near &= BOUNDS[0] <= (plan.peak_bytes + late) / measured and plan.peak_bytes / measured <= BOUNDS[1]
    return Result(
        outcome="ok" if is_near else "failed",
        found="planned over measured peak: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()),
        expected=f"from {BOUNDS[0]} to {BOUNDS[1]}" + (f", or {late / 1e6:.1f} MB less" if late else ""),
        values={"planned/measured": {name: round(ratio, 4) for name, ratio in ratios.items()}},
    )


def measured_peak(subject: Subject, workload: Workload) -> int:
    """Bytes that MLX held at most, beyond what it held before, from loading the weights to some decode steps."""
    mx = import_mlx()
    mx.synchronize()
    gc.collect()  # a model of an earlier measurement would be freed within this one
    mx.clear_cache()
    before = int(mx.get_active_memory())
    mx.reset_peak_memory()
    model = load_model(subject.pocket_folder)
    decoder = Decoder(model.module, n_ids=model.tokenizer.n_ids)
    sampler = Sampler(Sampling(seed=0).resolve(NEUTRAL), seed=0)
    row = Row(sampler, cache=new_cache(model.module, workload.kv_bits), max_tokens=_N_TOKENS)
    for _ in decoder.prefill(row, [7] * (_CONTEXT - _N_TOKENS), chunk=workload.prefill_step):
        pass
    for _ in range(_N_TOKENS):
        decoder.draw(row)
    return int(mx.get_peak_memory()) - before
