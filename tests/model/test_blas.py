"""Products by BLAS beside MLX's own, and which rows take which."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from qwq_mlx.model import blas_threads
from qwq_mlx.model.blas import blas_quantized_matmul, use_blas_for_rows
from qwq_mlx.model.blas_threads import _blas, by_blocks, one_blas_thread
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("n_rows", [9, 35])  # twice: fewer than the codes of a group, or more
def test_the_product_is_that_of_the_unpacked_matrix(bits: int, group_size: int, n_rows: int) -> None:
    rng = np.random.default_rng(bits * group_size)
    weight = mx.array(rng.standard_normal((70, 256)).astype(np.float32))
    packed = mx.quantize(weight, group_size=group_size, bits=bits)
    x = mx.array(rng.standard_normal((2, n_rows, 256)).astype(np.float32))

    y = blas_quantized_matmul(x, *packed, group_size=group_size, bits=bits)

    floats = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits)).astype(np.float64)
    np.testing.assert_allclose(np.array(y), np.array(x) @ floats.T, atol=2e-4)


def test_a_matrix_of_several_blocks_is_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = mx.quantize(mx.random.normal((37, 128), key=mx.random.key(1)), group_size=64, bits=4)
    x = mx.random.normal((8, 128), key=mx.random.key(2))
    whole = blas_quantized_matmul(x, *packed, group_size=64, bits=4)

    monkeypatch.setattr("qwq_mlx.model.blas_threads._BLOCK_BYTES", 5 * 4 * 128)
    monkeypatch.setattr("qwq_mlx.model.blas_threads._SMALL_BYTES", 0)

    np.testing.assert_allclose(blas_quantized_matmul(x, *packed, group_size=64, bits=4), whole, atol=1e-5)


def test_a_product_that_fails_leaves_nobody_behind_and_a_failure_in_another_thread_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blas_threads, "n_processors", lambda: 2)
    caller, are_both_at_work, is_done = threading.get_ident(), threading.Barrier(2), threading.Event()

    def fail_here(block: slice) -> None:
        are_both_at_work.wait(10)
        if threading.get_ident() == caller:
            raise MemoryError("here")
        is_done.wait(0.2)  # longer than the caller takes to give up
        is_done.set()

    with pytest.raises(MemoryError, match="here"):
        by_blocks(fail_here, 2, 1 << 20)
    assert is_done.is_set()

    def fail_there(block: slice) -> None:
        are_both_at_work.wait(10)
        if threading.get_ident() != caller:
            raise MemoryError("there")

    with pytest.raises(MemoryError, match="there"):
        by_blocks(fail_there, 2, 1 << 20)


def test_a_product_does_not_wait_for_threads_that_others_keep_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas_threads, "n_processors", lambda: 2)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as caller:
        monkeypatch.setattr(blas_threads, "_threads", lambda: pool)
        may_end = threading.Event()
        pool.submit(may_end.wait)
        blocks: list[slice] = []
        try:
            caller.submit(by_blocks, blocks.append, 4, 1 << 20).result(10)
        finally:
            may_end.set()
    assert blocks == [slice(row, row + 1) for row in range(4)]


def test_blocks_of_two_threads_that_overlap_put_the_number_of_threads_back() -> None:
    """Though threadpoolctl takes a number of the first thread alone that sets one."""
    with threadpool_limits(2, user_api="blas"), one_blas_thread():
        pass
    threads, first, second = _blas().lib_controllers, one_blas_thread(), one_blas_thread()
    before = [each.num_threads for each in threads]
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert {each.num_threads for each in threads} == {1}  # the second still computes
        other.submit(second.__exit__, None, None, None).result()
    assert [each.num_threads for each in threads] == before


@pytest.mark.parametrize("kind", ["linear", "quantized", "embedding", "quantized embedding"])
def test_fewer_rows_keep_mlx_bits_and_more_agree_with_them(kind: str) -> None:
    linear, embedding = nn.Linear(128, 96), nn.Embedding(96, 128)
    layer: nn.Module = {
        "linear": linear,
        "quantized": nn.QuantizedLinear.from_linear(linear, 64, 4),
        "embedding": embedding,
        "quantized embedding": nn.QuantizedEmbedding.from_embedding(embedding, 64, 4),
    }[kind]

    def product(x: mx.array) -> np.ndarray:
        return np.array(layer.as_linear(x) if "embedding" in kind else layer(x))

    few = mx.random.normal((1, MIN_BLAS_ROWS - 1, 128), key=mx.random.key(3))
    many = mx.random.normal((1, MIN_BLAS_ROWS, 128), key=mx.random.key(4))
    before = product(few), product(many)

    use_blas_for_rows(nn.Sequential(layer))

    np.testing.assert_array_equal(product(few), before[0])
    np.testing.assert_allclose(product(many), before[1], atol=1e-5)
    assert not np.array_equal(product(many), before[1])  # else MLX has become as quick, or BLAS was not taken
