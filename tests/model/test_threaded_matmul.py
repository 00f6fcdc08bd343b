"""Products that the processors share beside MLX's own product of the whole matrix: every bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.model import threaded_matmul
from qwq_mlx.model.threaded_matmul import threaded_quantized_matmul

N_IN = 1024
N_OUT = 1030  # four blocks of unequal sizes

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="of the CPU")


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever machine this is."""
    monkeypatch.setattr(threaded_matmul, "n_processors", lambda: 4)
    threaded_matmul._streams.cache_clear()
    yield
    threaded_matmul._streams.cache_clear()


def packed(bits: int) -> tuple[mx.array, mx.array, mx.array]:
    weight = mx.array(np.random.default_rng(bits).standard_normal((N_OUT, N_IN), np.float32))
    codes, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    mx.eval(codes, scales, biases)
    return codes, scales, biases


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_few_rows_get_the_bits_of_the_whole_product(bits: int) -> None:
    parts = packed(bits)
    for n_rows in (1, 2, 7):
        x = mx.array(np.random.default_rng(n_rows).standard_normal((n_rows, 1, N_IN), np.float32))
        shared = threaded_quantized_matmul(x, *parts, group_size=64, bits=bits)
        whole = mx.quantized_matmul(x, *parts, transpose=True, group_size=64, bits=bits)
        assert shared.shape == (n_rows, 1, N_OUT) and mx.array_equal(shared, whole)


def test_each_thread_that_computes_has_streams_of_its_own_compiled_too() -> None:
    parts, x = packed(4), mx.ones((1, N_IN))
    mx.eval(x)
    compiled = mx.compile(lambda x: threaded_quantized_matmul(x, *parts, group_size=64, bits=4) * 2)
    found: list[np.ndarray] = []

    def compute() -> None:
        found.extend(np.array(compiled(x)) for _ in range(3))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    compute()
    expected = np.array(mx.quantized_matmul(x, *parts, transpose=True, group_size=64, bits=4)) * 2
    assert len(found) == 12 and all(np.array_equal(each, expected) for each in found)


@pytest.mark.parametrize(
    ("n_processors", "smallest", "n_blocks"), [(4, 1 << 18, 4), (2, 1 << 18, 2), (4, 1 << 19, 2), (4, 1 << 21, 1)]
)
def test_a_small_matrix_is_left_whole_and_a_large_one_has_a_block_for_each_processor(
    monkeypatch: pytest.MonkeyPatch, n_processors: int, smallest: int, n_blocks: int
) -> None:
    parts, x = packed(4), mx.ones((1, N_IN))
    monkeypatch.setattr(threaded_matmul, "n_processors", lambda: n_processors)
    monkeypatch.setattr(threaded_matmul, "_MIN_BLOCK", smallest)
    sizes: list[int] = []

    def counted(x: mx.array, weight: mx.array, *rest: mx.array, **options: object) -> mx.array:
        sizes.append(len(weight))
        return mx.zeros((1, len(weight)))

    monkeypatch.setattr(mx, "quantized_matmul", counted)
    assert threaded_quantized_matmul(x, *parts, group_size=64, bits=4).shape == (1, N_OUT)
    assert len(sizes) == n_blocks and sum(sizes) == N_OUT and max(sizes) - min(sizes) <= 1
