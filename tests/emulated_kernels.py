"""The kernels of qwq_mlx/model/kernels on a CPU, by a C++ compiler, as they are launched: bodies, grids, memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qwq_mlx.model.kernels
from qwq_mlx.model.kernels import decode_attention, few_row_matmul
from qwq_mlx.model.kernels.tiling import choose_tiling

__all__ = ["EmulatedKernels"]

COMPILER = shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(qwq_mlx.model.kernels.__file__).parent
HEADERS = Path(__file__).parent / "model/kernels"
TYPES = {mx.bfloat16: "bf16", mx.float32: "float", mx.uint32: "uint32_t", mx.int32: "int"}
FLAGS = ["-std=c++20", "-O1", "-pthread", "-fPIC", "-w"]
SHARED = "  extern __shared__ __align__(16) unsigned char shared[];\n"
PATTERN = 0xA5  # of memory that nobody wrote


class EmulatedKernels:
    """`cuda_kernel` for a CPU: each set of template values is compiled when it is first called.

    folder: for what is compiled.
    """

    def __init__(self, folder: Path) -> None:
        if COMPILER is None:
            pytest.skip("there is no C++ compiler")
        (folder / "cuda_bf16.h").touch()
        for header in HEADERS.glob("*.h"):
            shutil.copy(header, folder)
        if "g++" in Path(COMPILER).name:  # it reads the header from there if there is one: half the time of a kernel
            header = folder / "emulated_tensor_cores.h"
            subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", "-o", f"{header}.gch", str(header)], check=True)
        self._folder = folder
        self._compiled: dict[str, Any] = {}
        self._shared: dict[tuple[Any, ...], int] = {}

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Launch all kernels here from now on, and choose tilings anew."""
        for module in (few_row_matmul, decode_attention):
            monkeypatch.setattr(module, "cuda_kernel", self)
            module._kernel.cache_clear()
        choose_tiling.cache_clear()

    def __call__(
        self, files: Sequence[str], name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, **given: int
    ) -> Callable[..., list[mx.array]]:
        n_shared = given.get("n_shared", 0)

        def kernel(**call: Any) -> list[mx.array]:
            first = self._shared.setdefault((name, *call["template"]), n_shared)
            assert n_shared == first, f"MLX gives {name} the {first} bytes that it was first launched with"
            arrays = [
                np.ascontiguousarray(_bits(each)) for each in call["inputs"]
            ]  # the same memory: some are written to
            results = [
                np.full((*shape[:-1], shape[-1] * dtype.size), PATTERN, np.uint8) for shape, dtype in _outputs(call)
            ]
            text = self._text(files, [*inputs, *outputs], source, n_shared, call)
            shapes = [(ctypes.c_int * 4)(*each.shape) for each in call["inputs"]]
            pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in (*arrays, *results)]
            given_shapes = (ctypes.c_void_p * len(shapes))(*(ctypes.addressof(each) for each in shapes))
            assert self._run(text)(given_shapes, *pointers) == 0, f"{name} writes behind its shared memory"
            return [
                mx.array(each).view(dtype).reshape(shape)
                for each, (shape, dtype) in zip(results, _outputs(call), strict=True)
            ]

        return kernel

    def _text(
        self, files: Sequence[str], names: Sequence[str], source: str, n_shared: int, call: dict[str, Any]
    ) -> str:
        kinds = [TYPES[each.dtype] for each in call["inputs"]] + [TYPES[each] for each in call["output_dtypes"]]
        values = "".join(f"constexpr int {key} = {int(value)};\n" for key, value in call["template"])
        n_threads, grid = call["threadgroup"][0], call["grid"]
        shapes = "".join(
            f"const int* {name}_shape = shapes[{place}];\n"
            for place, name in enumerate(names[: len(call["inputs"])])
            if f"{name}_shape" in source
        )
        given = ", ".join(f"{kind}* {each}" for kind, each in zip(kinds, names, strict=True))
        return (
            '#include "emulated_tensor_cores.h"\n'
            + "".join(f'#include "{file}"\n' for file in files if file != "tensor_cores.cu")
            + f"alignas(16) unsigned char dynamic[{n_shared + 16}];\n{values}"
            + f'extern "C" int run(const int** shapes, {given}) {{\n{shapes}'
            + f"memset(dynamic, {PATTERN}, sizeof dynamic);\n"
            + f"launch({grid[0] // n_threads}, {grid[1]}, {n_threads}, [&] {{\n"
            + source.replace(SHARED, "  unsigned char* shared = dynamic;\n")
            + f"}});\nfor (int i = 0; i < 16; ++i) if (dynamic[{n_shared} + i] != {PATTERN}) return 1;\nreturn 0; }}\n"
        )

    def _run(self, text: str) -> Any:
        if text not in self._compiled:
            at = self._folder / f"run{len(self._compiled)}"
            at.with_suffix(".cpp").write_text(text)
            flags = [*FLAGS, "-shared", f"-I{self._folder}", f"-I{FOLDER}"]
            subprocess.run([str(COMPILER), *flags, "-o", at.with_suffix(".so"), at.with_suffix(".cpp")], check=True)
            self._compiled[text] = ctypes.CDLL(str(at.with_suffix(".so"))).run
        return self._compiled[text]


def _bits(array: mx.array) -> Any:
    mx.eval(array)
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _outputs(call: dict[str, Any]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    return list(zip(call["output_shapes"], call["output_dtypes"], strict=True))
