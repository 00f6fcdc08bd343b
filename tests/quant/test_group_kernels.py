"""The kernels of `group_kernels`, on a CPU by a C++ compiler, beside error feedback and descent in numpy.

Bodies, grids and arguments are those that it launches on a GPU. A thread of theirs never waits for another, so here
they run one after the other.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.quant import device_feedback, group_kernels
from qwq_mlx.quant.device_moments import factor_on_device
from qwq_mlx.quant.error_feedback import factor_moments, fit_rows
from qwq_mlx.quant.packing import Packed, Packing, unpack_codes
from qwq_mlx.quant.rounding_error import unpack

COMPILER = shutil.which("g++") or shutil.which("clang++")
CUDA = """
#include <math.h>
#include <cstdint>
#include <cstring>
#include <cstddef>
#define __device__
#define __forceinline__ inline
#define __shared__ static
struct Index { int x; };
static Index blockIdx, threadIdx;
inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
"""
TYPES = {mx.float32: "float", mx.int32: "int"}
UNWRITTEN = np.float32(-1234.5)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


class Emulated:
    """`mx.fast.cuda_kernel` for a CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compiled: dict[str, Any] = {}
        self.launched: list[str] = []

    def __call__(
        self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
    ) -> Callable[..., list[mx.array]]:
        def kernel(**call: Any) -> list[mx.array]:
            self.launched.append(name)
            n_threads = call["threadgroup"][0]
            assert call["grid"][0] % n_threads == 0
            arrays = [np.array(each) for each in call["inputs"]]
            results = [np.full(shape, UNWRITTEN) for shape in call["output_shapes"]]
            kinds = [f"const {TYPES[each.dtype]}" for each in call["inputs"]] + ["float"] * len(results)
            names = (*input_names, *output_names)
            given = ", ".join(f"{kind}* {each}" for kind, each in zip(kinds, names, strict=True))
            values = "".join(f"constexpr int {key} = {value};\n" for key, value in call["template"])
            text = (
                f'{CUDA}{header}{values}extern "C" void run(int blocks, int threads, {given}) {{\n'
                "for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)\n"
                f"for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {{ {source} }} }}\n"
            )
            pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in (*arrays, *results)]
            self._run(text)(call["grid"][0] // n_threads, n_threads, *pointers)
            assert not any((each == UNWRITTEN).any() for each in results), f"{name} leaves numbers unwritten"
            return [mx.array(each) for each in results]

        return kernel

    def _run(self, text: str) -> Any:
        if text not in self._compiled:
            at = self._folder / f"run{len(self._compiled)}"
            at.with_suffix(".cpp").write_text(text)
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
            subprocess.run([COMPILER, *flags, "-o", at.with_suffix(".so"), at.with_suffix(".cpp")], check=True)
            self._compiled[text] = ctypes.CDLL(str(at.with_suffix(".so"))).run
        return self._compiled[text]


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    emulator = Emulated(tmp_path)
    monkeypatch.setattr(mx.fast, "cuda_kernel", emulator)
    monkeypatch.setattr(device_feedback, "group_kernels_run", lambda: True)
    group_kernels._kernel.cache_clear()
    yield emulator
    group_kernels._kernel.cache_clear()


RANDOM = np.random.default_rng(11)
COLUMNS = 256
X = (RANDOM.standard_normal((700, COLUMNS)) @ RANDOM.standard_normal((COLUMNS, COLUMNS))) * np.exp(
    RANDOM.standard_normal(COLUMNS)
) + 3 * RANDOM.standard_normal(COLUMNS)
PRODUCTS = X.T @ X / len(X)


def weights(n_rows: int) -> np.ndarray:
    drawn = (0.02 * RANDOM.standard_t(5, (n_rows, COLUMNS))).astype(np.float32)
    drawn[3, :128] = 0.25  # a group whose weights are all alike
    drawn[4, 128:] = 0.0
    return drawn


def loss(wanted: np.ndarray, packed: Packed, packing: Packing, dtype: str) -> float:
    errors = wanted.astype(float) - unpack(packed, packing, dtype, stream=None)
    return float(np.einsum("ri,ij,rj->", errors, PRODUCTS, errors))


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "n_rows"),
    [(2, 64, "BF16", 40), (3, 32, "F16", 130), (4, 128, "F32", 33), (4, 64, "BF16", 64), (8, 64, "BF16", 65)],
)
def test_the_kernels_find_what_numpy_finds(bits: int, group: int, dtype: str, n_rows: int, emulated: Emulated) -> None:
    packing, wanted = Packing(bits=bits, group_size=group), weights(n_rows)
    blocks = [PRODUCTS[:128, :128], PRODUCTS[128:, 128:]]
    expected = fit_rows(wanted, factor_moments([each.copy() for each in blocks]), packing, dtype)
    moments = factor_on_device([mx.array(each.astype(np.float32)) for each in blocks])
    packed, unpacked = device_feedback.fit_rows_on_device(mx.array(wanted), moments, packing, dtype)
    n_groups = COLUMNS // group
    assert emulated.launched.count("group_fit_feed_back") == n_groups
    assert emulated.launched.count("group_fit_descend") == 2 * n_groups
    same = unpack_codes(packed.codes, bits) == unpack_codes(expected.codes, bits)
    # A sum in another order moves a tie, and what follows from it; errors of 8 bits are near the rounding of float32.
    assert same.mean() > (0.98 if bits < 8 else 0.95)
    by_numpy = loss(wanted, expected, packing, dtype)
    assert loss(wanted, packed, packing, dtype) == pytest.approx(by_numpy, rel=1e-2)
    assert np.array_equal(np.array(unpacked), unpack(packed, packing, dtype, stream=None))


@pytest.mark.parametrize(("dtype", "to"), [("BF16", mx.bfloat16), ("F16", mx.float16), ("F32", mx.float32)])
def test_scales_and_biases_are_what_the_file_can_hold(dtype: str, to: mx.Dtype, emulated: Emulated) -> None:
    columns = mx.array((np.exp(RANDOM.uniform(-17, 9, 200)) * RANDOM.standard_normal((32, 200))).astype(np.float32))
    packing, factor = Packing(bits=4, group_size=32), mx.eye(32)
    codes, scales, biases, errors = group_kernels.feed_back_group(columns, factor, mx.ones(32), 0, packing, dtype)
    for each in (scales, biases):
        assert np.array_equal(np.array(each), np.array(each.astype(to).astype(mx.float32)))
    unpacked = np.array(codes) * np.array(scales) + np.array(biases)
    assert np.allclose(np.array(errors), np.array(columns) - unpacked, rtol=1e-5, atol=1e-9)
