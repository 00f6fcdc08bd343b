"""How long and how much memory a measurement takes, before it starts: two products are timed for some milliseconds.

Does not: know the disk (1 GB/s is assumed), or how a busy machine is in an hour. Not measured on Metal.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence

from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes
from qwq_mlx.model.device import CACHE_BYTES
from qwq_mlx.model.layers import HEAD_BLOCK_BYTES
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quality.text import QualityText

__all__ = ["best_time", "estimate_memory_bytes", "estimate_s"]

_DISK_BYTES_S = 1e9
_UNPACKING_BYTES = 14  # a weight, while codes that fill bytes are unpacked
_ODD_UNPACKING_BYTES = 25  # of 3, 5 and 6 bits
_CACHED = 1.5  # freed memory that MLX keeps, times what is in use, up to its limit
_ROWS, _WIDTH, _HEADS, _HEAD_DIM = 256, 1024, 4, 64


def estimate_s(config: Qwen2Config, windows: Sequence[int], *, weights_bytes: int) -> float:
    """Seconds to measure one model against its source.

    windows: ids that are run together, of each window. weights_bytes: of both folders together.
    """
    n_weights = sum(shape[0] * shape[1] for shape in tensor_shapes(config).values() if len(shape) == 2)
    products = 2 * n_weights * sum(windows)
    pairs = sum(n_ids**2 for n_ids in windows)
    attention = 4 * pairs * config.hidden_size * config.num_hidden_layers
    product_rate, attention_rate = _rates()
    return 2 * (products / product_rate + attention / attention_rate) + weights_bytes / _DISK_BYTES_S


def estimate_memory_bytes(config: Qwen2Config, text: QualityText, *, bits: Collection[int]) -> int:
    """Bytes while a layer or, behind the last, a block of the output matrix of both models is at work, of both models'
    hidden states, and of what MLX keeps of freed memory. bits: that the conversion's matrices have.

    A layer is in float32 and half as much again while it is read, beside what the longest window needs on its way. The
    two blocks of the output matrix are in float32 beside what unpacking takes (MLX 0.32 on the CPU), both models'
    logits and their exponentials.
    """
    shapes = tensor_shapes(config).items()
    layer = sum(shape[0] * shape[1] for name, shape in shapes if len(shape) == 2 and ".layers.0." in name)
    longest = max(len(window.ids) for window in text.windows)
    inner = config.intermediate_size + 2 * config.hidden_size + config.num_attention_heads * longest // 2
    rows = min(config.vocab_size, HEAD_BLOCK_BYTES // (4 * config.hidden_size))
    unpacking = _UNPACKING_BYTES if all(each in (2, 4, 8) for each in bits) else _ODD_UNPACKING_BYTES
    layers = 6 * layer + 2 * 4 * longest * inner
    heads = (2 * 4 + unpacking) * rows * config.hidden_size + 5 * 4 * longest * rows
    active = max(layers, heads) + 2 * 4 * text.n_positions * config.hidden_size
    return active + min(CACHE_BYTES, int(_CACHED * active))


@functools.cache
def _rates() -> tuple[float, float]:
    """Operations a second of a matrix product as a layer makes it, and of attention.

    Timed once a process, about 0.1 s: every plan of a conversion asks.
    """
    from qwq_mlx.model.products import attention, linear_product

    mx = import_mlx()
    x, weight = mx.random.normal((_ROWS, _WIDTH)), mx.random.normal((_WIDTH, _WIDTH))
    queries = mx.random.normal((1, _HEADS, _ROWS, _HEAD_DIM))
    mx.eval(x, weight, queries)

    product = best_time(lambda: mx.eval(linear_product(x, weight)))
    attending = best_time(lambda: mx.eval(attention(queries, queries, queries)))
    return 2 * _ROWS * _WIDTH**2 / product, 4 * _ROWS**2 * _HEADS * _HEAD_DIM / attending


def best_time(run: Callable[[], object]) -> float:
    """Seconds of a short piece of work, the best of five tries: on a busy machine one may take 30 times as long."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
