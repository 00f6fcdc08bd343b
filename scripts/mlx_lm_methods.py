"""mlx-lm's own GPTQ, AWQ, DWQ and dynamic_quant on a checkpoint, in a process of its own.

    python scripts/mlx_lm_methods.py METHOD SOURCE OUTPUT BITS IDS

`measure_recipes.py --mlx-lm` and `measure_real.py` start it. METHOD: GPTQ, AWQ, DWQ or DYNAMIC. IDS: a JSON list of
rows of ids, all of one length: the text to calibrate or distil with. Every matrix, the embedding too, gets BITS in
groups of 64; DYNAMIC spreads the bytes of that over BITS - 1 and BITS + 1. All else is mlx-lm's default; DWQ takes
its 512 steps of 4 rows, going over the rows again where they are fewer.

Two things are not as mlx_lm.awq and the others run, because MLX's CPU backend would take hours: the arithmetic is
float32 instead of bfloat16 (a BLAS multiplies only that), and a packed layer unpacks its weights before it multiplies,
a tied output matrix too, which gives the same numbers as the packed product and the same gradients. Scales and biases
are stored in bfloat16.

Does not: measure the result, or change what a method decides.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

GROUP = 64
N_VALID = 4  # rows that DWQ watches its loss on
N_STEPS, BATCH = 512, 4  # of DWQ


def main() -> int:
    """Quantize and save."""
    method, source, output, bits, ids = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    from mlx_lm.utils import load, save

    mx.random.seed(0)
    nn.QuantizedLinear.__call__ = nn.QuantizedEmbedding.as_linear = _multiply_unpacked
    model, tokenizer, config = load(source, return_config=True)
    model.set_dtype(mx.float32)
    rows = json.loads(Path(ids).read_text(encoding="utf-8"))
    model, config = METHODS[method](model, config, rows, bits)
    model.set_dtype(mx.bfloat16)
    save(output, source, model, tokenizer, config)
    return 0


def _multiply_unpacked(layer: Any, x: mx.array) -> mx.array:
    weights = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    return x @ weights.T + layer.bias if "bias" in layer else x @ weights.T


def _gptq(model: Any, config: dict[str, Any], rows: list[list[int]], bits: int) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.quant.gptq import gptq_quantize

    model, config["quantization"] = gptq_quantize(model, mx.array(rows), bits, GROUP, bits, GROUP)
    return model, config


def _awq(model: Any, config: dict[str, Any], rows: list[list[int]], bits: int) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    map_ = AWQ_MODEL_CONFIGS[config["model_type"]]
    awq_quantize(model, mx.array(rows), map_, bits=bits, group_size=GROUP, embed_bits=bits, embed_group_size=GROUP)
    return model, update_config(model, config)


def _dwq(model: Any, config: dict[str, Any], rows: list[list[int]], bits: int) -> tuple[Any, dict[str, Any]]:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    packed = copy.deepcopy(model)
    _, config = quantize_model(packed, config, group_size=GROUP, bits=bits)
    learned = [(row, 0) for row in rows[N_VALID:]]
    learned = list(itertools.islice(itertools.cycle(learned), max(len(learned), N_STEPS * BATCH)))
    dwq_quantize(
        packed,
        lambda batch, place, split: model(batch),
        Adam(learning_rate=1e-6, bias_correction=True),
        learned,
        [(row, 0) for row in rows[:N_VALID]],
        batch_size=BATCH,
        max_seq_length=1025,
        seed=123,
        dtype=mx.float32,
    )
    return packed, config


def _dynamic(model: Any, config: dict[str, Any], rows: list[list[int]], bits: int) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    low, high = bits - 1, bits + 1
    listed = estimate_sensitivities(model, mx.array(rows), low, GROUP, high, GROUP, batch_size=1)
    sensitivities = dict(listed)
    threshold = estimate_threshold(model, sensitivities, bits + 32 / GROUP, low, GROUP, high, GROUP)

    def packing(path: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": high, "group_size": GROUP} if sensitivities[path] > threshold else True

    packed, config = quantize_model(model, config, group_size=GROUP, bits=low, quant_predicate=packing)
    return packed, config


METHODS = {"GPTQ": _gptq, "AWQ": _awq, "DWQ": _dwq, "DYNAMIC": _dynamic}

if __name__ == "__main__":
    sys.exit(main())
