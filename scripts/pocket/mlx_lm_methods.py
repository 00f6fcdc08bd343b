"""mlx-lm's own GPTQ, AWQ and DWQ on a checkpoint, in a process of its own: `measure_recipes.py --mlx-lm` starts it.

    python scripts/pocket/mlx_lm_methods.py METHOD SOURCE OUTPUT BITS IDS

METHOD: GPTQ, AWQ or DWQ. IDS: a JSON list of rows of ids, all of one length: the text to calibrate or distil with.
Every matrix, the embedding too, gets BITS in groups of 64; all else is mlx-lm's default.

Two things are not as mlx_lm.awq and the others run, because MLX's CPU backend would take hours: the arithmetic is
float32 instead of bfloat16 (a BLAS multiplies only that), and a packed layer unpacks its weights before it multiplies,
which gives the same numbers as the packed product and the same gradients. Scales and biases are stored in bfloat16.

Does not: measure the result, or change what a method decides.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

GROUP = 64
N_VALID = 4  # rows that DWQ watches its loss on


def main() -> int:
    """Quantize and save."""
    method, source, output, bits, ids = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    from mlx_lm.utils import load, save

    mx.random.seed(0)
    nn.QuantizedLinear.__call__ = _multiply_unpacked
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
    data = [(row, 0) for row in rows]
    dwq_quantize(
        packed,
        lambda batch, place, split: model(batch),
        Adam(learning_rate=1e-6, bias_correction=True),
        data[N_VALID:],
        data[:N_VALID],
        batch_size=4,
        max_seq_length=1025,
        seed=123,
        dtype=mx.float32,
    )
    return packed, config


METHODS = {"GPTQ": _gptq, "AWQ": _awq, "DWQ": _dwq}

if __name__ == "__main__":
    sys.exit(main())
