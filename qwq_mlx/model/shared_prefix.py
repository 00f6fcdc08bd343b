"""The beginning that several KV caches have in common, held once: each cache holds only the positions behind it.

The samples of a vote share their prompt, or a trace up to some token. What they share is never written, so all of them
refer to the same arrays. To attend, one row's keys are put behind the shared ones for one layer and let go again, so
its bits are those that it has with a cache of its own. Where rows may attend in a batch (`batched_cache`), the shared
keys are read once for all rows and the two parts meet in one softmax, as in cascade attention
(https://flashinfer.ai/2024/02/02/cascade-inference.html); its bits are others.

Does not: find out what rows have in common (a fork knows), or share less than whole leading positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.model.memory.activations import CACHE_STEP, n_positions

__all__ = ["MIN_SHARED", "SharedLayer", "SharesPrefix", "attend_behind", "padded"]

MIN_SHARED = CACHE_STEP
"""Positions from which a beginning is shared; fewer are copied, which costs less than two parts in each pass."""

_NAMES = ("keys", "values")


class SharedLayer:
    """One layer's keys and values of the first n positions of several rows.

    arrays: "keys" and "values", each (1, heads, n, width), or codes, scales and biases of these widths.
    """

    def __init__(self, arrays: dict[str, tuple[mx.array, ...]]) -> None:
        self.arrays = arrays

    @property
    def n(self) -> int:
        """Positions."""
        return int(self.arrays["keys"][0].shape[2])

    def first(self, n: int) -> SharedLayer:
        """Its first n positions: itself, or views, or copies where a view would keep more than it shows."""
        if n == self.n:
            return self
        if 2 * n < self.n:
            return first_positions(self.arrays, n)
        return SharedLayer({name: tuple(part[..., :n, :] for part in parts) for name, parts in self.arrays.items()})


class SharesPrefix:
    """What a KV cache of mlx_lm's does besides, where it begins with a `SharedLayer`.

    `offset` and `room` count all positions; `keys` and `values` then hold those behind the shared ones, or None.
    """

    prefix: SharedLayer | None = None
    _lent: weakref.ref[SharedLayer] | None = None
    offset: int
    keys: Any
    values: Any

    @property
    def n_shared(self) -> int:
        """Leading positions that are held for several rows."""
        return 0 if self.prefix is None else self.prefix.n

    @property
    def room(self) -> int:
        """Positions that it has room for; 0 before its first use."""
        parts = self.own("keys")
        return self.n_shared + (int(parts[0].shape[2]) if parts else 0)

    def own(self, name: str) -> tuple[mx.array, ...]:
        """Its own keys or values, one array or codes, scales and biases; none where it has no room of its own."""
        array_or_parts = getattr(self, name)
        if array_or_parts is None:
            return ()
        return (array_or_parts,) if isinstance(array_or_parts, mx.array) else tuple(array_or_parts)

    def set_own(self, name: str, parts: Sequence[mx.array]) -> None:
        """Exchange what `own` gives."""
        is_quantized = hasattr(self, "bits")
        setattr(self, name, None if not parts else list(parts) if is_quantized else parts[0])

    def whole(self, name: str) -> tuple[mx.array, ...]:
        """Keys or values of all the room, shared ones first."""
        own = self.own(name)
        if self.prefix is None:
            return own
        shared = self.prefix.arrays[name]
        return tuple(mx.concatenate([*pair], axis=2) for pair in zip(shared, own, strict=True)) if own else shared

    def seen(self, name: str) -> mx.array:
        """Keys or values of all positions that it holds, behind a prefix and not quantized."""
        assert self.prefix is not None, "else they lie in one array"
        return mx.concatenate(
            [self.prefix.arrays[name][0], self.own(name)[0][..., : self.offset - self.n_shared, :]], 2
        )

    def make_room(self, n_ids: int) -> None:
        """Let it hold n_ids more positions."""
        needed = self.offset + n_ids
        if needed <= self.room:
            return
        n_own, room = self.offset - self.n_shared, n_positions(needed) - self.n_shared
        for name in _NAMES:
            # without own ones, no position of the shared ones has the right shape and type
            parts = self.own(name) or (self.prefix.arrays[name] if self.prefix is not None else ())
            grown = [padded(part[..., :n_own, :], room) for part in parts]
            self.set_own(name, grown)
            mx.eval(grown)

    def append(self, keys: Sequence[mx.array], values: Sequence[mx.array]) -> None:
        """Write positions behind those that it holds. keys, values: (1, heads, n, width), parts as in `own`."""
        n = keys[0].shape[2]
        self.make_room(n)
        start = self.offset - self.n_shared
        for name, new in zip(_NAMES, (keys, values), strict=True):
            parts = list(self.own(name))
            self.set_own(name, ())  # nobody else may hold them, or they are copied
            for part, fresh in zip(parts, new, strict=True):
                part[..., start : start + n, :] = fresh
            self.set_own(name, parts)
        self.offset += n

    def trim(self, n: int) -> int:
        """Forget the last n positions, shared ones too where there are so few own ones; returns how many there were."""
        n = min(self.offset, n)
        self.offset -= n
        lent = None if self._lent is None else self._lent()
        if lent is not None and lent.n > self.offset:  # what comes there next may be others
            self._lent = None
        if self.prefix is not None and self.offset < self.n_shared:
            # the room stays as it is, for attention over a quantized cache reads all of it
            own_room = self.room - self.offset
            cut = {name: [part[..., :0, :] for part in self.prefix.arrays[name]] for name in _NAMES}
            self.prefix = self.prefix.first(self.offset) if self.offset else None
            for name, parts in cut.items():
                self.set_own(name, [padded(part, own_room) for part in parts])
        return n

    def lent(self, n: int) -> SharedLayer | None:
        """What `share` gave for n positions, as long as somebody has it."""
        lent = None if self._lent is None else self._lent()
        return lent if lent is not None and lent.n == n else None

    def would_refer(self, n: int) -> bool:
        """Whether `share` of n positions lets this cache refer to them as well."""
        return self.lent(n) is None and n > self.n_shared and self.offset - n < CACHE_STEP

    def share(self, n: int) -> SharedLayer:
        """Its first n positions for other rows; n: at most offset. As long as somebody has them, the same ones again.

        Where few positions lie behind them, this cache refers to them as well from now on, so that they are in memory
        once; else they are twice, and this cache attends without putting two parts together in each pass.
        """
        lent = self.lent(n)
        if lent is not None:
            return lent
        if self.prefix is not None and n <= self.n_shared:
            shared = self.prefix.first(n)
            self._lent = weakref.ref(shared)
            return shared
        refers = self.would_refer(n)
        shared = first_positions({name: self.whole(name) for name in _NAMES}, n)
        if refers:
            own_room, before = self.room - n, self.n_shared
            if n == self.offset and n_positions(n + 1) == self.room:
                own_room = 0  # it gets the same room again when it goes on
            for name in _NAMES:
                behind = [padded(part[..., n - before : self.offset - before, :], own_room) for part in self.own(name)]
                mx.eval(behind)
                self.set_own(name, behind if own_room else ())
            self.prefix = shared
        self._lent = weakref.ref(shared)
        return shared


def first_positions(arrays: Mapping[str, Sequence[mx.array]], n: int) -> SharedLayer:
    """The first n positions of keys and values as arrays of their own.

    A view would keep all the others in memory for as long as any row has it, also when whoever wrote them has gone on,
    in a copy, or is gone.
    """
    own = {name: tuple(mx.contiguous(part[..., :n, :]) for part in parts) for name, parts in arrays.items()}
    mx.eval(own)
    return SharedLayer(own)


def padded(array: mx.array, room: int) -> mx.array:
    """An array (..., positions, width) with zeros behind its positions."""
    if array.shape[2] == 0:
        return mx.zeros((*array.shape[:2], room, array.shape[3]), array.dtype)
    return mx.pad(array, [(0, 0), (0, 0), (0, room - array.shape[2]), (0, 0)])


def attend_behind(
    shared: SharedLayer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """The attention of rows that share their beginning, (rows, heads, n_ids, width), whose keys are read once for all.

    queries: (rows, heads, n_ids, width). keys, values: (rows, key heads, positions, width), behind the shared ones.
    mask: (rows, 1, n_ids, positions), true where an id may look; None is everywhere.
    """
    n_rows, n_heads, n_ids, width = queries.shape
    n_kv_heads, n = keys.shape[1], shared.n
    [shared_keys], [shared_values] = shared.arrays["keys"], shared.arrays["values"]
    by_row = (queries * scale).reshape(n_rows, n_kv_heads, -1, width)  # the query heads of a key head together
    together = by_row.transpose(1, 0, 2, 3).reshape(1, n_kv_heads, -1, width)
    before = (together @ shared_keys.swapaxes(2, 3)).reshape(n_kv_heads, n_rows, -1, n).transpose(1, 0, 2, 3)
    behind = by_row @ keys.swapaxes(2, 3)
    if mask is not None:
        behind = behind.reshape(n_rows, n_heads, n_ids, -1)
        behind = mx.where(mask, behind, mx.finfo(behind.dtype).min).reshape(n_rows, n_kv_heads, -1, behind.shape[-1])
    weights = mx.softmax(mx.concatenate([before, behind], axis=-1), axis=-1, precise=True)
    of_shared = weights[..., :n].transpose(1, 0, 2, 3).reshape(1, n_kv_heads, -1, n) @ shared_values
    mixed = of_shared.reshape(n_kv_heads, n_rows, -1, width).transpose(1, 0, 2, 3) + weights[..., n:] @ values
    return mixed.reshape(n_rows, n_heads, n_ids, width)
