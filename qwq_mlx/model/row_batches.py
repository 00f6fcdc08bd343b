"""Which rows share a batch (`batched_cache`), made, joined, left and given up, in all layers.

Does not: attend, or choose the rows of a pass.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.model.batched_cache import NAMES, BatchedLayer, own_copy, part_of
from qwq_mlx.model.memory.activations import CACHE_STEP

__all__ = ["batched", "disband", "joint_batch", "size_class"]


def size_class(cache: Any) -> tuple[int, int]:
    """Rows of one class may share a batch: behind what they share, their rooms differ by less than 1,024 positions, or
    by less than a quarter of the smallest."""
    n_blocks = (cache.room - cache.n_shared - 1) // CACHE_STEP
    shift = max(2, n_blocks.bit_length() - 3)
    return shift, n_blocks >> shift


def batched(rows: Sequence[Sequence[Any]]) -> Sequence[BatchedLayer]:
    """The batch of some rows' caches, by layer: the one they are in, or a new one.

    rows: the caches of each row by layer, all behind the same prefix. A new batch is made one layer after another, keys
    and then values, so that half a layer of the rows is held twice.
    """
    batch = rows[0][0].batch
    first = [row[0] for row in rows]
    # a row that left and attended alone is among the members still, but the batch does not hold it any more
    if batch is not None and batch.members == first and all(each.batch is batch for each in first):
        return [layer.batch for layer in rows[0]]
    return [_new_batch(members) for members in zip(*rows, strict=True)]


def joint_batch(rows: Sequence[Sequence[Any]]) -> Sequence[BatchedLayer]:
    """A batch that holds all of these rows, by layer, and perhaps others: for who attends by places in it.

    rows: see `batched`. Rows that come take the places of those that left; a new batch is made where there are too few,
    and where more than a fourth of the places stay free.
    """
    found = {id(row[0].batch): row[0].batch for row in rows if row[0].batch is not None}
    for batch in found.values():
        coming = [row for row in rows if not batch.holds(row[0])]
        free = batch.free_places
        n_free, n_places = len(free) - len(coming), len(batch.members)
        has_room = all(row[0].room - row[0].n_shared <= batch.own_room for row in coming)
        if n_free >= 0 and 4 * n_free <= n_places and has_room:
            layers = [layer.batch for layer in next(row for row in rows if batch.holds(row[0]))]
            if coming:
                for number, layer in enumerate(layers):
                    layer.take_in([row[number] for row in coming], free[: len(coming)])
            return layers
    return [_new_batch(members) for members in zip(*rows, strict=True)]


def disband(rows: Sequence[Sequence[Any]]) -> None:
    """Give rows in batches, and those beside them, their own caches again: one layer's keys, then its values."""
    for row in rows:
        for layer in row:
            batch = getattr(layer, "batch", None)
            if batch is None:
                continue
            members = [each for each in batch.members if each is not None and each.batch is batch]
            for name in NAMES:
                copies = [own_copy(batch, each, name) for each in members]
                mx.eval(copies)
                del batch.arrays[name]
                for each, copied in zip(members, copies, strict=True):
                    setattr(each, f"_{name}", copied)
            for each in members:
                each.batch = None


def _new_batch(members: Sequence[Any]) -> BatchedLayer:
    before = {id(each.batch): each.batch for each in members if each.batch is not None}
    staying = set(map(id, members))
    for old in before.values():
        for each in old.members:
            if each is not None and each.batch is old and id(each) not in staying:
                each.leave()
    batch = BatchedLayer(members)
    own_room = max(each.room - each.n_shared for each in members)
    for name in NAMES:
        batch.arrays[name] = _gathered(members, name, own_room)
        mx.eval(batch.arrays[name])
        for old in before.values():
            del old.arrays[name]
        for each in members:
            setattr(each, f"_{name}", None)
    for place, each in enumerate(members):
        each.batch, each.place = batch, place  # its own arrays are gone
    return batch


def _gathered(members: Sequence[Any], name: str, own_room: int) -> mx.array:
    """A copy of the members' keys or values, (rows, heads, own_room, width).

    Of a batch that most of them are in already they are taken at once: on a GPU a copy of each row is a launch of its
    own, and rows may come and go every other pass. Where rows need more room they are written one by one, for to pad
    them all at once would hold them three times.
    """
    counted = collections.Counter(id(each.batch) for each in members if each.batch is not None)
    most = counted.most_common(1)[0][0] if counted else 0
    old = next((each.batch for each in members if each.batch is not None and id(each.batch) == most), None)
    if old is not None and old.arrays[name].shape[2] == own_room:
        at_once = [each.batch is old for each in members]
        places = [each.place if is_in else 0 for each, is_in in zip(members, at_once, strict=True)]
        array: mx.array = old.arrays[name][mx.array(places)]
    elif len(members) == 1:
        # a slice that is all of an array is no copy when it is written, but what others hold, perhaps with gaps
        return part_of(members[0], name)[mx.array([0])]
    else:
        at_once = [False] * len(members)
        _, n_heads, _, width = part_of(members[0], name).shape
        array = mx.zeros((len(members), n_heads, own_room, width), part_of(members[0], name).dtype)
    for place, (each, is_in) in enumerate(zip(members, at_once, strict=True)):
        if not is_in:
            part = part_of(each, name)
            array[place : place + 1, :, : part.shape[2]] = part
    return array
