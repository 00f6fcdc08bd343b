"""The KV caches of the rows of a pass as one, by layer: what `attention` attends over.

Rows attend one by one, each over its own cache; or, where they may, in batches (`batched_cache`); or on CUDA in place
(`kernels.decode_attention`), which needs no batch of rows of one length and gives a row the bits that it has alone.

Does not: attend, or decide which rows share a pass (`engine.decoder` does).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.batched_cache import BatchedLayer, Writing, row_cache_class
from qwq_mlx.model.kernels.decode_attention import Rotation
from qwq_mlx.model.rotations import Rotations, rotations_in_place
from qwq_mlx.model.row_batches import batched, disband, joint_batch, size_class

__all__ = ["InPlaceRows", "RowCaches", "RowGroup", "SeveralEach", "in_order", "joined"]


class SeveralEach(NamedTuple):
    """How the ids of a batch lie where a row feeds several of them.

    n: ids of the row with the most. fed: (rows * n,) places in the pass, a row's last id again where it has fewer.
    picked: which of these are no repetition, None for all.
    """

    n: int
    fed: mx.array
    picked: mx.array | None


class RowGroup(NamedTuple):
    """Rows of a pass that attend together: one with its cache, or a batch. All but the cache is the same in each layer.

    places: of their ids in the pass. taken: the same as an index. writing: of a batch. several: of one in which a row
    feeds several ids.
    """

    cache: Any
    places: Sequence[int]
    taken: slice | mx.array
    writing: Writing | None = None
    several: SeveralEach | None = None


class RowCaches:
    """One layer's caches of the rows of a pass, each with its own length.

    groups: of all rows. The pass is (ids, 1), a row's ids one after another.
    offset: (ids,) positions before each id, the same in every layer.
    order: (ids,) where each id of the pass is in the groups, one after another; None where it is in order.
    is_exact: an id attends alone, as in a pass of one id, whose bits it then gets; else a row's ids attend at once.
    """

    def __init__(self, groups: Sequence[RowGroup], offset: mx.array, order: mx.array | None, *, is_exact: bool) -> None:
        self.groups = tuple(groups)
        self.offset, self.order = offset, order
        self.is_exact = is_exact

    def make_mask(self, n_ids: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: the last id of a row may look at all that its cache holds, and `Attention` masks for the others."""


class InPlaceGroup(NamedTuple):
    """Rows of a pass in one batch. rows: their caches in this layer, with the ids that each feeds. at: see
    `kernels.decode_attention`, the same in each layer."""

    batch: BatchedLayer
    rows: Sequence[tuple[Any, int]]
    at: mx.array


class OtherRows(NamedTuple):
    """Rows of a pass beside those that attend in place. cache: theirs, as `joined` gives it. taken: their ids."""

    cache: Any
    taken: slice | mx.array


class InPlaceRows:
    """One layer's caches of the rows of a pass that attend by `kernels.decode_attention`.

    order: (ids,) where each id of the pass is in the groups and the others, one after another; None where it is in
    order. others: rows that cannot, being empty or quantized; so who shares a pass with them has its own bits still.
    """

    def __init__(
        self,
        groups: Sequence[InPlaceGroup],
        rotation: Rotation,
        order: mx.array | None,
        others: OtherRows | None,
    ) -> None:
        self.groups, self.rotation, self.order, self.others = tuple(groups), rotation, order, others

    def make_mask(self, n_ids: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: an id looks at what its row holds."""

    def advance(self) -> None:
        """The ids of the pass are in the caches."""
        for group in self.groups:
            for cache, n in group.rows:
                cache.offset += n


def joined(
    caches: Sequence[Sequence[Any]],
    n_fed: Sequence[int] | None = None,
    *,
    may_batch: bool = False,
    module: Any = None,
) -> Sequence[Any]:
    """The KV caches of some rows as one for their pass, by layer; that of a single row and id may be as it is.

    n_fed: ids that each row feeds; None is one each. may_batch: rows may attend in a batch, whose bits are not those of
    a row alone. module: whose layers they are, where those may attend in place.
    """
    n_fed = n_fed or [1] * len(caches)
    rotations = rotations_in_place(module)
    if rotations is not None and any(_has_room(row[0], n) for row, n in zip(caches, n_fed, strict=True)):
        return _in_place(caches, n_fed, rotations, may_batch=may_batch)
    if list(n_fed) == [1] and not (may_batch and _is_behind_prefix(caches[0])):
        return caches[0]
    if not may_batch:
        disband(caches)
    offset = mx.array([row[0].offset + place for row, n in zip(caches, n_fed, strict=True) for place in range(n)])
    # On CUDA attention of several ids at once makes a plan for each new length of the cache, about 1 ms a layer.
    is_exact = mx.default_device().type == mx.cpu or mx.cuda.is_available()
    groups = _row_groups(caches, n_fed, offset, may_batch=may_batch)
    order = _order([place for group in groups for place in group[0].places])
    return [RowCaches(layer, offset, order, is_exact=is_exact) for layer in zip(*groups, strict=True)]


def _has_room(cache: Any, n: int) -> bool:
    return type(cache) is row_cache_class() and cache.offset + n <= cache.room and cache.offset >= cache.n_shared


def _in_place(
    caches: Sequence[Sequence[Any]], n_fed: Sequence[int], rotations: Rotations, *, may_batch: bool
) -> Sequence[InPlaceRows]:
    firsts = list(itertools.accumulate(n_fed, initial=0))
    alike: dict[tuple[tuple[int, int], int], list[int]] = {}
    rest = []
    for place, (row, n_own) in enumerate(zip(caches, n_fed, strict=True)):
        if _has_room(row[0], n_own):
            alike.setdefault((size_class(row[0]), id(row[0].prefix)), []).append(place)
        else:
            rest.append(place)
    groups, places = [], []
    for members in alike.values():
        layers = joint_batch([caches[place] for place in members])
        at = []
        for place in members:
            row, first = caches[place][0], firsts[place]
            at += [(row.place, first + n, first, row.offset) for n in range(n_fed[place])]
        places += [own[1] for own in at]
        shared_at = mx.array(at, mx.int32)
        groups.append(
            [
                InPlaceGroup(batch, [(caches[place][layer], n_fed[place]) for place in members], shared_at)
                for layer, batch in enumerate(layers)
            ]
        )
    others: Sequence[OtherRows | None] = [None] * len(caches[0])
    if rest:
        own_places = [firsts[place] + n for place in rest for n in range(n_fed[place])]
        beside = joined([caches[place] for place in rest], [n_fed[place] for place in rest], may_batch=may_batch)
        others = [OtherRows(layer, mx.array(own_places)) for layer in beside]
        places += own_places
    positions = [row[0].offset + n for row, n_own in zip(caches, n_fed, strict=True) for n in range(n_own)]
    rotation = Rotation(*(each.reshape(len(positions), -1) for each in rotations.at(mx.array(positions), 1)))
    order = _order(places)
    return [InPlaceRows(layer, rotation, order, beside) for *layer, beside in zip(*groups, others, strict=True)]


def in_order(parts: list[mx.array], order: mx.array | None) -> mx.array:
    """What the groups of a pass gave as one array, an id of the pass after another."""
    together = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return together if order is None else together[order]


def _order(places: Sequence[int]) -> mx.array | None:
    order = sorted(range(len(places)), key=places.__getitem__)
    return None if order == list(range(len(places))) else mx.array(order)


def _row_groups(
    caches: Sequence[Sequence[Any]], n_fed: Sequence[int], offset: mx.array, *, may_batch: bool
) -> list[list[RowGroup]]:
    """The groups of a pass, each by layer."""
    starts = itertools.accumulate(n_fed, initial=0)
    places = {place: range(start, start + n) for place, (start, n) in enumerate(zip(starts, n_fed, strict=False))}
    alike: dict[tuple[tuple[int, int], int], list[int]] = {}
    for place, (row, n) in enumerate(zip(caches, n_fed, strict=True)):
        if may_batch and type(row[0]) is row_cache_class() and row[0].offset + n <= row[0].room:
            alike.setdefault((size_class(row[0]), id(row[0].prefix)), []).append(place)
    groups = []
    for candidates in alike.values():
        room = max(caches[place][0].room for place in candidates)
        most = max(n_fed[place] for place in candidates)
        together = [place for place in candidates if caches[place][0].offset + most <= room]
        if len(together) > 1 or (together and _is_behind_prefix(caches[together[0]])):
            layers = batched([caches[place] for place in together])
            own = [places.pop(place) for place in together]
            several = _several([list(each) for each in own]) if most > 1 else None
            at = [place for each in own for place in each]
            taken = _index(at)
            ends = offset[taken] if several is None else offset[several.fed[:: several.n]]
            writing = layers[0].writing(ends, [len(each) for each in own])
            groups.append([RowGroup(layer, at, taken, writing, several) for layer in layers])
    alone = ((caches[place], at, slice(at[0], at[0] + len(at))) for place, at in places.items())
    return [*groups, *([RowGroup(layer, at, taken) for layer in row] for row, at, taken in alone)]


def _index(places: Sequence[int]) -> slice | mx.array:
    """Some places of a pass as an index."""
    near = range(places[0], places[0] + len(places))
    return slice(near.start, near.stop) if list(places) == list(near) else mx.array(list(places))


def _is_behind_prefix(row: Sequence[Any]) -> bool:
    """Whether a batch of this row alone is worth it: else what it shares is copied in each pass."""
    return type(row[0]) is row_cache_class() and row[0].prefix is not None


def _several(places: Sequence[list[int]]) -> SeveralEach:
    """places: of each row's ids in the pass."""
    n_each = [len(each) for each in places]
    n = max(n_each)
    fed = [place for each in places for place in [*each, *each[-1:] * (n - len(each))]]
    picked = [row * n + place for row, n_own in enumerate(n_each) for place in range(n_own)]
    return SeveralEach(n, mx.array(fed), None if min(n_each) == n else mx.array(picked))
