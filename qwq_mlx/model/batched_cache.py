"""KV caches of rows that decode side by side, kept as one array for each layer: a pass attends once for all of them.

On a GPU a pass is as slow as its launches, and rows that attend one by one need some nine in each layer. In a batch
they need five together, which on an H200 halves a pass of 8 rows and takes it from 113 to 43 ms for 32. It is
not measured on Metal. Rows share a batch where they have room for about as many positions (`row_batches`), and then all
have the room of the longest; it grows for all of them when that one needs more, and is made anew when rows come or go.
A row that leaves has the room again that it has alone.

A row's own cache stays what everybody else sees: who reads its `keys` or `values` takes the row out of its batch.

On CUDA rows attend in place (`kernels.decode_attention`), each by its place in the batch: some rows of it may make a
pass of their own, and rows that come take the places of those that left.

Rows that share their beginning (`shared_prefix`) have only what is behind it in the batch, and share a batch only with
each other.

Rows may feed several ids, and not equally many: what a row lacks is filled by its last id, whose keys are written
behind the row's end, where nobody looks before they are written anew.

Does not: batch quantized caches; those attend one by one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.model.kernels.decode_attention import CacheArrays
from qwq_mlx.model.memory.activations import n_positions
from qwq_mlx.model.shared_prefix import SharesPrefix, padded
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["NAMES", "BatchedLayer", "Writing", "own_copy", "part_of", "row_cache_class"]

NAMES = ("keys", "values")


class Writing(NamedTuple):
    """Where a pass writes into the layers of a batch: the same in each of them, so worked out once.

    n_each: ids of each row.
    n_seen: positions behind what they share that any row looks at; the last is every row's only id where they are even.
    at: (rows, n) positions behind what they share, where rows differ; n is that of the row with the most ids.
    mask: (rows, 1, n, n_seen), true where an id may look; None is everywhere.
    """

    n_each: Sequence[int]
    n_seen: int
    at: mx.array | None
    mask: mx.array | None


class BatchedLayer:
    """One layer's keys and values of some rows, behind what they share.

    prefix: what they share, None for nothing.
    arrays: (rows, heads, room, width) each.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        # weak, for a member refers to its batch: a cycle would keep the arrays until Python looks for cycles
        self._members = [weakref.ref(each) for each in members]
        self.prefix = members[0].prefix
        self.arrays: dict[str, mx.array] = {}

    @property
    def members(self) -> list[Any]:
        """The rows' caches, in order; None for one that is gone."""
        return [each() for each in self._members]

    @property
    def own_room(self) -> int:
        """Positions that each row has room for behind what they share."""
        return int(self.arrays["keys"].shape[2])

    def whole(self) -> CacheArrays:
        """All of its arrays, and what its rows share."""
        shared = None if self.prefix is None else (self.prefix.arrays["keys"][0], self.prefix.arrays["values"][0])
        return CacheArrays(self.arrays["keys"], self.arrays["values"], shared)

    def holds(self, cache: Any) -> bool:
        """Whether it is where a row's positions are: one that left is among its members still."""
        return cache is not None and cache.batch is self

    @property
    def free_places(self) -> list[int]:
        """Those whose row has left, or is gone."""
        return [place for place, each in enumerate(self.members) if not self.holds(each)]

    def take_in(self, caches: Sequence[Any], places: Sequence[int]) -> None:
        """Let rows have free places, which have room for all that they hold; half a layer is held twice at most."""
        for name in NAMES:
            array = self.arrays.pop(name)  # nobody else may hold it, or it is copied
            for cache, place in zip(caches, places, strict=True):
                # all of its room: where rows are masked, what the one before left may not be NaN
                array[place : place + 1] = padded(part_of(cache, name), array.shape[2])
            self.arrays[name] = array
            mx.eval(array)
            for cache in caches:
                setattr(cache, f"_{name}", None)
        for cache, place in zip(caches, places, strict=True):
            self._members[place] = weakref.ref(cache)
            cache.batch, cache.place = self, place

    def row(self, name: str, place: int) -> mx.array:
        """A row's keys or values, (1, heads, room, width)."""
        return self.arrays[name][place : place + 1]

    def make_room(self, own_room: int) -> None:
        """Let every row hold so many positions behind what they share; half a layer is held twice meanwhile."""
        for name in NAMES:
            self.arrays[name] = padded(self.arrays[name], own_room)
            mx.eval(self.arrays[name])

    def writing(self, ends: mx.array, n_each: Sequence[int]) -> Writing:
        """Where a pass writes that feeds n_each ids of each row. ends: (rows,) positions that each holds before."""
        n, n_shared = max(n_each), 0 if self.prefix is None else self.prefix.n
        offsets = {member.offset - n_shared for member in self.members}
        n_seen = max(offsets) + n
        if len(offsets) == 1 and n == 1:
            return Writing(n_each, n_seen, None, None)
        at = ends[:, None] + mx.arange(-n_shared, n - n_shared)
        return Writing(n_each, n_seen, at, (mx.arange(n_seen) <= at[..., None])[:, None])

    def append(self, keys: mx.array, values: mx.array, writing: Writing) -> tuple[mx.array, mx.array]:
        """Append positions to each row; returns all keys and values behind what they share, the room among them.

        keys, values: (rows, heads, n, width), of which the first of a row are its own; each has room for n.
        """
        for name, new in zip(NAMES, (keys, values), strict=True):
            if new.dtype == mx.float32 and mx.default_device().type == mx.cpu:
                _write_at_once(self.arrays[name], new, writing)  # may fail, and then the rows have what they had
                continue
            array = self.arrays.pop(name)  # nobody else may hold it, or it is copied
            if writing.at is None:
                array[:, :, writing.n_seen - 1 : writing.n_seen] = new
            else:
                array = mx.put_along_axis(array, mx.broadcast_to(writing.at[:, None, :, None], new.shape), new, axis=2)
            self.arrays[name] = array
        for member, n_own in zip(self.members, writing.n_each, strict=True):
            member.offset += n_own
        return self.arrays["keys"], self.arrays["values"]


def _write_at_once(array: mx.array, new: mx.array, writing: Writing) -> None:
    """Write positions where MLX holds them, by numpy; all is evaluated.

    MLX 0.32.4 copies the room of all rows for it on the CPU where their places differ, and waits for its thread.
    """
    held, written = np.asarray(array), np.asarray(new)
    if writing.at is None:
        held[:, :, writing.n_seen - 1] = written[:, :, 0]
    else:
        at = np.asarray(writing.at)
        held[np.arange(len(at))[:, None], :, at] = written.swapaxes(1, 2)


@functools.cache
def row_cache_class() -> type[Any]:
    """mlx_lm's KVCache, whose keys and values may be a row of a `BatchedLayer`, and begin with a `SharedLayer`."""

    class RowCache(SharesPrefix, import_mlx_lm("mlx_lm.models.cache").KVCache):  # type: ignore[misc]
        batch: BatchedLayer | None = None
        place = 0

        @property
        def room(self) -> int:
            """Positions that it has room for; 0 before its first use."""
            return super().room if self.batch is None else self.n_shared + self.batch.own_room

        def make_room(self, n_ids: int) -> None:
            """Let it, and all rows of its batch, hold as many positions as n_ids more need."""
            if self.batch is None:
                super().make_room(n_ids)
            elif self.offset + n_ids > self.room:
                self.batch.make_room(n_positions(self.offset + n_ids) - self.n_shared)

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            """Append positions; returns keys and values to attend to."""
            if self.prefix is None:
                return super().update_and_fetch(keys, values)  # type: ignore[no-any-return]
            self.append([keys], [values])
            return self.seen("keys"), self.seen("values")

        @property
        def keys(self) -> Any:
            self.leave()
            return self._keys

        @keys.setter
        def keys(self, array: Any) -> None:
            self._keys = array

        @property
        def values(self) -> Any:
            self.leave()
            return self._values

        @values.setter
        def values(self, array: Any) -> None:
            self._values = array

        def leave(self) -> None:
            """Take this row out of its batch: keys and values are its own again, as copies."""
            batch = self.batch
            if batch is not None:
                self._keys, self._values = (own_copy(batch, self, name) for name in NAMES)
                mx.eval(self._keys, self._values)  # a view would keep the whole batch
                self.batch = None

        def trim(self, n: int) -> int:
            """Forget the last n positions; a row that goes back before what it shares leaves its batch."""
            if self.offset - n < self.n_shared:
                self.leave()
            return super().trim(n)

    return RowCache


def own_copy(batch: BatchedLayer, cache: Any, name: str) -> mx.array:
    """A row's keys or values with the room that it has alone."""
    own_room = n_positions(max(cache.offset, cache.n_shared + 1)) - cache.n_shared
    return mx.contiguous(batch.row(name, cache.place)[:, :, :own_room])


def part_of(cache: Any, name: str) -> mx.array:
    """A row's keys or values, wherever they are."""
    array: mx.array = cache.own(name)[0] if cache.batch is None else cache.batch.row(name, cache.place)
    return array
