"""The kernels of attention in place, on a CPU by a C++ compiler, beside mlx's own rope and attention in float32.

On a GPU `python -m qwq_mlx.doctor` holds them against numpy.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qwq_mlx.model.kernels
from qwq_mlx.model.kernels import decode_attention
from qwq_mlx.model.kernels.decode_attention import CacheArrays, attends_in_place
from qwq_mlx.model.rotations import Rotations

COMPILER = shutil.which("g++") or shutil.which("clang++")
WARPS, BASE = decode_attention._WARPS, 1e4
MAX_CHUNKS = 4  # of 128 positions; fewer than on a GPU, so that they grow from 512 on
SOURCE = """
#include "emulated_cuda.h"
#include "decode_attention.cu"
extern "C" void run(
    const bf16* queries, const bf16* keys, const bf16* values, const float* cosines, const float* sines, const int* at,
    bf16* cached_keys, bf16* cached_values, const bf16* shared_keys, const bf16* shared_values, const uint32_t* arrived,
    int room, int n_shared, int n_ids, int backwards, float* sums, float* totals, bf16* mixed) {
  is_backwards = backwards;
  launch(n_ids * E_KV_HEADS, E_CHUNKS, 32 * E_WARPS, [&] {
    attend_chunk<E_WIDTH, E_GROUP, E_KV_HEADS, E_WARPS, E_UNROLL>(
        {queries, keys, values, cosines, sines}, at,
        {cached_keys, cached_values, shared_keys, shared_values, room, n_shared},
        {sums, totals, arrived, 128, E_CHUNKS, E_CHUNKS}, mixed);
  });
}
"""
SHAPES = {"QwQ's": (5, 2, 128), "the 0.5B's": (7, 2, 64)}  # query heads of a key head, key heads, width


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def shape(request: Any) -> tuple[int, int, int]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(shape: tuple[int, int, int], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda_bf16.h").touch()
    (folder / "run.cpp").write_text(SOURCE)
    group, n_kv_heads, width = shape
    values = {"GROUP": group, "KV_HEADS": n_kv_heads, "WIDTH": width, "WARPS": WARPS, "CHUNKS": MAX_CHUNKS}
    values["UNROLL"] = decode_attention._unroll(group)
    includes = [folder, Path(__file__).parent, Path(qwq_mlx.model.kernels.__file__).parent]
    subprocess.run(
        [COMPILER, "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-w", *(f"-I{each}" for each in includes)]
        + [f"-DE_{name}={value}" for name, value in values.items()]
        + ["-o", folder / "run.so", folder / "run.cpp"],
        check=True,
    )
    return ctypes.CDLL(str(folder / "run.so")).run  # type: ignore[no-any-return]


@dataclass
class Pass:
    """Random projections of the ids of a pass, and caches of its rows. n_before: positions that each row holds."""

    shape: tuple[int, int, int]
    n_each: Sequence[int]
    n_before: Sequence[int]
    room: int
    n_shared: int = 0
    projected: list[Any] = field(init=False)
    cached: list[Any] = field(init=False)
    shared: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        group, n_kv_heads, width = self.shape
        keys = iter(mx.random.split(mx.random.key(sum(self.n_before)), 7))
        n_ids, n_rows = sum(self.n_each), len(self.n_each)

        def bits(*shape: int) -> Any:
            return np.array(mx.random.normal(shape, mx.bfloat16, key=next(keys)).view(mx.uint16))

        self.projected = [bits(n_ids, n * n_kv_heads * width) for n in (group, 1, 1)]
        self.cached = [bits(n_rows, n_kv_heads, self.room, width) for _ in range(2)]
        self.shared = [bits(1, n_kv_heads, max(1, self.n_shared), width) for _ in range(2)]

    @property
    def at(self) -> list[tuple[int, int, int, int]]:
        """As the kernels take it."""
        firsts = itertools.accumulate(self.n_each, initial=0)
        rows = zip(range(len(self.n_each)), firsts, self.n_each, self.n_before, strict=False)
        return [(row, first + n, first, before) for row, first, n_own, before in rows for n in range(n_own)]

    def position(self, place: int) -> int:
        _, at, first, before = self.at[place]
        return before + at - first

    def run(self, run: Callable[..., None], places: Sequence[int] | None = None, *, is_backwards: bool = False) -> Any:
        """What the kernels make of some ids, each fed alone; None is all at once. (ids, heads, width) bits.

        is_backwards: whether the last block runs first.
        """
        group, n_kv_heads, width = self.shape
        at = self.at if places is None else [(self.at[n][0], n, n, self.position(n)) for n in places]
        n_ids = len(at)
        positions = mx.array([self.position(n) for n in range(sum(self.n_each))])
        rotation = [np.array(each).reshape(-1, width) for each in Rotations(width, BASE).at(positions, 1)]
        sums = np.full((n_ids, group * n_kv_heads, MAX_CHUNKS, width + 2), np.nan, np.float32)
        totals, mixed = sums.copy(), np.empty((n_ids, group * n_kv_heads, width), np.uint16)
        arrived = np.zeros((sum(self.n_each), n_kv_heads), np.uint32)
        arrays = [*self.projected, *rotation, np.array(at, np.int32), *self.cached, *self.shared, arrived]
        pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in (*arrays, sums, totals, mixed)]
        run(*pointers[:-3], self.room, self.n_shared, n_ids, int(is_backwards), *pointers[-3:])
        return mixed

    def expected(self, place: int) -> tuple[mx.array, mx.array, mx.array]:
        """What an id attends to, (heads, width), and its key and value, (key heads, width); by mlx in float32."""
        _, n_kv_heads, width = self.shape
        row, at, first, before = self.at[place]
        keys, values = (
            mx.concatenate([_floats(shared)[:, :, : self.n_shared], _floats(own)[row : row + 1]], axis=2)[:, :, :before]
            for shared, own in zip(self.shared, self.cached, strict=True)
        )
        for n in range(first, at + 1):
            key, value = (_floats(each[n]).reshape(1, n_kv_heads, 1, width) for each in self.projected[1:])
            key = _rotated(key, self.position(n)).astype(mx.bfloat16).astype(mx.float32)
            keys, values = mx.concatenate([keys, key], axis=2), mx.concatenate([values, value], axis=2)
        query = _rotated(_floats(self.projected[0][at]).reshape(1, -1, 1, width), self.position(place))
        mixed = mx.fast.scaled_dot_product_attention(query, keys, values, scale=width**-0.5)
        return mixed[0, :, 0], key[0, :, 0], value[0, :, 0]


def _floats(bits: Any) -> mx.array:
    return mx.array(bits).view(mx.bfloat16).astype(mx.float32)


def _rotated(heads: mx.array, position: int) -> mx.array:
    return mx.fast.rope(heads, heads.shape[-1], traditional=False, base=BASE, scale=1.0, offset=position)


PASSES = {
    "rows of their own lengths": {"n_each": (1, 1, 1), "n_before": (5, 130, 255), "room": 256},
    "several ids of a row, across a chunk's end": {"n_each": (4, 1), "n_before": (126, 3), "room": 256},
    "the first id of an empty row": {"n_each": (1, 2), "n_before": (0, 0), "room": 256},
    "behind what they share": {"n_each": (2, 1), "n_before": (300, 101), "room": 256, "n_shared": 100},
}


@pytest.mark.parametrize("settings", PASSES.values(), ids=PASSES)
def test_each_id_attends_to_its_row_and_leaves_its_key_and_value_in_the_cache(
    shape: tuple[int, int, int], run: Callable[..., None], settings: dict[str, Any]
) -> None:
    fed = Pass(shape, **settings)
    expected = [fed.expected(place) for place in range(len(fed.at))]
    before = [each.copy() for each in fed.cached]
    found = _floats(fed.run(run))
    for place, (mixed, *own) in enumerate(expected):
        assert mx.abs(found[place] - mixed).max().item() < 0.01
        at = (fed.at[place][0], slice(None), fed.position(place) - fed.n_shared)
        for cached, untouched, want in zip(fed.cached, before, own, strict=True):
            assert mx.abs(_floats(cached[at]) - want).max().item() < 0.02
            cached[at] = untouched[at]
    assert all(np.array_equal(*pair) for pair in zip(fed.cached, before, strict=True)), "nothing else is written"


@pytest.mark.parametrize("settings", PASSES.values(), ids=PASSES)
def test_an_id_has_the_bits_that_it_has_alone_in_a_larger_room_and_with_blocks_in_another_order(
    shape: tuple[int, int, int], run: Callable[..., None], settings: dict[str, Any]
) -> None:
    together, alone = Pass(shape, **settings), Pass(shape, **settings)
    alone.cached = [np.pad(each, ((0, 0), (0, 0), (0, 256), (0, 0))) for each in alone.cached]
    alone.room += 256
    one_by_one = [alone.run(run, [place], is_backwards=True)[0] for place in range(len(alone.at))]
    assert np.array_equal(together.run(run), one_by_one)
    for ours, theirs in zip(together.cached, alone.cached, strict=True):
        assert np.array_equal(ours, theirs[:, :, : together.room])


def test_where_chunks_are_too_few_they_grow_and_an_id_still_has_the_bits_that_it_has_alone(
    shape: tuple[int, int, int], run: Callable[..., None]
) -> None:
    settings: dict[str, Any] = {"n_each": (3,), "n_before": (MAX_CHUNKS * 128 - 2,), "room": MAX_CHUNKS * 128 + 256}
    together, alone = Pass(shape, **settings), Pass(shape, **settings)
    expected = [together.expected(place)[0] for place in range(3)]
    found = together.run(run)
    assert mx.abs(_floats(found) - mx.stack(expected)).max().item() < 0.01
    assert np.array_equal(found, [alone.run(run, [place])[0] for place in range(3)])


def test_heads_that_the_kernels_are_not_made_for_are_left_to_mlx() -> None:
    assert attends_in_place(40, 8, 128) and attends_in_place(14, 2, 64) and attends_in_place(12, 2, 128)
    assert not attends_in_place(40, 8, 96) and not attends_in_place(8, 1, 64) and not attends_in_place(18, 2, 64)


def test_the_arrays_of_a_cache_need_nothing_shared() -> None:
    assert CacheArrays(mx.zeros(1), mx.zeros(1)).shared is None
