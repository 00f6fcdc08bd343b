"""How much a model's outputs lose by each of its matrices: the factors behind `--target-size`.

    python scripts/measure_sensitivity.py SOURCE TRACES.jsonl [--bits 3] [--traces 8] [--context 768]

One matrix at a time is packed as mx.quantize packs it, in groups of 64, all others stay, and the mean KL to bf16 is
taken over the responses of some recorded outputs (as `recorded` says). To first order a loss is a sum over matrices of
their relative squared errors times a factor of each (the linearity theorem of HIGGS, Malinovskii et al. 2024,
arXiv 2411.17525); "factor" is that KL over the relative squared error. A line of JSON for each matrix goes to stdout.
In float32; on MLX's CUDA backend set MLX_ENABLE_TF32=0. Time is a pass of the text for every matrix.

Does not: choose anything by it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure_real import CALIBRATE_EVERY, read_windows, say  # noqa: E402
from recorded import read_rows  # noqa: E402

from qwq_mlx.model.folder import open_model_folder  # noqa: E402
from qwq_mlx.quality.text import Window  # noqa: E402

GROUP = 64


def main() -> int:
    """Pack one matrix, measure, put it back; go on with the next."""
    options = parse()
    from mlx_lm.utils import load

    rows = [row for place, row in enumerate(read_rows(options.traces)) if place % CALIBRATE_EVERY]
    step = max(1, len(rows) // options.n_traces)
    windows = read_windows(rows[::step][: options.n_traces], open_model_folder(options.source), options.context)
    model = load(str(options.source))[0]
    model.set_dtype(mx.float32)
    references = [logprobs(model, window) for window in windows]
    mx.eval(references)
    for path, module in matrices(model):
        weight = module.weight
        packed = mx.quantize(weight, GROUP, options.bits)
        module.weight = mx.dequantize(*packed, GROUP, options.bits)
        error = (mx.square(module.weight - weight).sum() / mx.square(weight).sum()).item()
        kl = divergence(model, windows, references)
        module.weight = weight
        row = {"path": path, "weights": weight.size, "error": error, "kl": kl, "factor": kl / error}
        print(json.dumps(row), flush=True)
        say({"path": path, "factor": round(kl / error, 4)})
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the bf16 checkpoint")
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response")
    parser.add_argument("--bits", type=int, default=3, help="of the packed matrix (default: %(default)s)")
    parser.add_argument("--traces", dest="n_traces", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=768, help="ids of a trace, at most (default: %(default)s)")
    return parser.parse_args()


def matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """Every matrix that a recipe packs, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % GROUP == 0:
            yield path, module


def logprobs(model: Any, window: Window) -> mx.array:
    """(measured, vocabulary): what the model gives each id of the response."""
    logits = model(mx.array(window.ids)[None])[0, window.first - 1 : -1]
    return nn.log_softmax(logits.astype(mx.float32), axis=-1)


def divergence(model: Any, windows: list[Window], references: list[mx.array]) -> float:
    """Mean KL over all measured ids."""
    total = 0.0
    for window, reference in zip(windows, references, strict=True):
        total += (mx.exp(reference) * (reference - logprobs(model, window))).sum().item()
    return total / sum(len(reference) for reference in references)


if __name__ == "__main__":
    sys.exit(main())
