"""Caches that share their beginning beside slow twins with caches of their own: the same bits on the CPU."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from configs import SMALL

from qwq_mlx.bench.models import random_module
from qwq_mlx.engine.kv_cache import borrowed, filled_cache, grow, layers_of, new_cache
from qwq_mlx.engine.row import Row
from qwq_mlx.model.row_caches import joined
from qwq_mlx.model.shared_prefix import SharedLayer

CONFIG = replace(SMALL, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=32)
BITS = pytest.mark.parametrize("kv_bits", [None, 8])

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def module() -> Any:
    return random_module(CONFIG, {}, "float32", seed=1)


def fork_of(module: Any, source: list[Any], n_ids: int, kv_bits: int | None = None) -> list[Any]:
    """As `forked_cache`, which copies so few positions."""
    fork = new_cache(module, kv_bits)
    for each, layer in zip(fork, source, strict=True):
        each.prefix, each.offset = layer.share(n_ids), n_ids
    return fork


class Twins:
    """A cache that begins with shared positions, and one that never shares, fed the same ids."""

    def __init__(self, module: Any, kv_bits: int | None, shared: list[Any], alone: list[Any]) -> None:
        self.module, self.kv_bits, self.shared, self.alone = module, kv_bits, shared, alone

    @classmethod
    def filled(cls, module: Any, n_ids: int, kv_bits: int | None) -> Twins:
        caches = [new_cache(module, kv_bits), new_cache(module, kv_bits)]
        for cache in caches:
            mx.eval(module(mx.array([[(3 * place) % 32 for place in range(n_ids)]]), cache=cache))
        return cls(module, kv_bits, caches[0], caches[1])

    def feed(self, ids: list[int]) -> None:
        """One pass of all ids, each attending as in a pass of its own; the logits have the same bits."""
        logits = []
        for cache in (self.shared, self.alone):
            grow(cache, len(ids))
            logits.append(self.module(mx.array([[each] for each in ids]), cache=joined([cache], [len(ids)])))
        assert mx.array_equal(*logits).item()

    def trim(self, n: int) -> None:
        for cache in (self.shared, self.alone):
            for layer in cache:
                layer.trim(n)

    def borrow(self, n_ids: int) -> None:
        """Hold fewer positions for a while, and others behind them."""
        with borrowed(self.shared, n_ids), borrowed(self.alone, n_ids):
            self.feed([1, 2])
        self.check()

    def fork(self, n_ids: int) -> Twins:
        shared = fork_of(self.module, self.shared, n_ids, self.kv_bits)
        alone = filled_cache(self.module, layers_of(self.alone, n_ids), self.kv_bits)
        return Twins(self.module, self.kv_bits, shared, alone)

    def check(self) -> None:
        """Every position holds the same bits."""
        offset = self.alone[0].offset
        assert {layer.offset for layer in (*self.shared, *self.alone)} == {offset}
        for mine, own in zip(layers_of(self.shared, offset), layers_of(self.alone, offset), strict=True):
            assert mine.arrays.keys() == own.arrays.keys()
            assert all(mx.array_equal(mine.arrays[name], own.arrays[name]).item() for name in own.arrays)


@BITS
def test_forks_of_one_cache_go_on_as_with_copies_and_leave_it_alone(module: Any, kv_bits: int | None) -> None:
    source = Twins.filled(module, 251, kv_bits)
    forks = [source.fork(n_ids) for n_ids in (251, 251, 250, 7, 7)]
    for first, second in ((0, 1), (3, 4)):
        assert forks[first].shared[0].prefix is forks[second].shared[0].prefix, "the same arrays"
    for place, fork in enumerate(forks):  # beyond the room that the source had
        for token_id in range(8):
            fork.feed([(5 * token_id + place) % 32])
        fork.check()
    source.feed([9])
    source.check()


@BITS
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_feeding_cutting_and_forking_gives_the_bits_of_a_cache_alone(
    module: Any, kv_bits: int | None, seed: int
) -> None:
    """Cut into what is shared too, and forks of forks."""
    rng = random.Random(seed)
    all_twins = [Twins.filled(module, 240 + 8 * seed, kv_bits)]
    for _ in range(25):
        twins = rng.choice(all_twins)
        offset = twins.alone[0].offset
        action = rng.choice(("feed", "feed", "trim", "borrow", "fork"))
        if action == "feed":
            twins.feed([rng.randrange(32) for _ in range(rng.randint(1, 6))])
        elif action == "trim":
            twins.trim(rng.choice((0, 1, 5, offset // 2)))
        elif action == "borrow":
            twins.borrow(rng.randint(max(1, offset - 12), offset))
        elif len(all_twins) < 5:
            all_twins.append(twins.fork(rng.randint(1, offset)))
        twins.check()
    for twins in all_twins:
        twins.check()


@pytest.mark.parametrize("n_ids", [250, 256])
def test_as_many_ids_are_drafted_for_a_fork_as_for_a_row_alone(module: Any, n_ids: int) -> None:
    """More would give it a larger room, in which attention over a quantized cache rounds otherwise."""
    source = Twins.filled(module, n_ids, 8)
    sampler: Any = None
    forked, alone = (Row(sampler, cache=each) for each in (source.fork(n_ids).shared, source.alone))
    assert forked.most_drafts == alone.most_drafts == {250: 5, 256: 255}[n_ids]


def test_what_is_shared_is_in_memory_once(module: Any) -> None:
    gc.collect()
    source = Twins.filled(module, 500, None).shared
    mx.clear_cache()
    before = mx.get_active_memory()
    forks = [fork_of(module, source, 500) for _ in range(20)]
    for fork in forks:
        grow(fork, 1)
        mx.eval(module(mx.array([[1]]), cache=fork))
    held = mx.get_active_memory() - before
    per_position = sum(layer.whole(name)[0].nbytes // layer.room for layer in source for name in ("keys", "values"))
    assert held < 500 * per_position, "12 of 512 positions each; a copy each would be 20 times this"
    assert source[0].prefix is forks[0][0].prefix, "and the source holds them no second time"


@pytest.mark.parametrize("is_behind_prefix", [False, True])
def test_a_fork_from_far_back_keeps_no_more_than_it_shares(module: Any, is_behind_prefix: bool) -> None:
    """The source goes on, or is gone: what it wrote behind the fork point is its own."""
    gc.collect()
    source = new_cache(module)
    mx.eval(module(mx.array([[7] * 1500]), cache=source))
    if is_behind_prefix:
        source = fork_of(module, source, 1500)
    per_position = sum(layer.whole(name)[0].nbytes // layer.room for layer in source for name in ("keys", "values"))
    fork = fork_of(module, source, 300)
    if is_behind_prefix:
        del source
        gc.collect()
    else:
        mx.eval(module(mx.array([[1]]), cache=source))
    mx.clear_cache()
    before = mx.get_active_memory()
    del fork
    mx.clear_cache()
    assert before - mx.get_active_memory() <= 400 * per_position, "300, and not 1,500"


def test_a_cache_that_is_let_go_takes_the_shared_arrays_with_it(module: Any) -> None:
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    source = Twins.filled(module, 500, None).shared
    fork = fork_of(module, source, 300)
    del source, fork
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("n_each", [1, 3])
def test_rows_behind_one_prefix_attend_in_a_batch_as_alone(module: Any, n_each: int) -> None:
    """As on a GPU: of several lengths, beside a row that shares nothing, and the last one of them."""
    source = Twins.filled(module, 260, None)
    rows = [source.fork(260) for _ in range(3)] + [Twins.filled(module, 9, None)]
    for n, twins in enumerate(rows):
        if n:
            twins.feed([n] * n)
    for among in (rows, rows[:2], rows[:1]):
        for twins in among:
            grow(twins.shared, n_each)
            grow(twins.alone, n_each)
        fed = mx.array([[7 * place % 32] for place in range(n_each * len(among))])
        n_fed = [n_each] * len(among)
        together = module(fed, cache=joined([twins.shared for twins in among], n_fed, may_batch=True))
        for place, twins in enumerate(among):
            part = fed[place * n_each : (place + 1) * n_each]
            alone = module(part, cache=joined([twins.alone], [n_each]))
            assert mx.abs(together[place * n_each : (place + 1) * n_each] - alone).max().item() < 1e-4
            assert twins.shared[0].offset == twins.alone[0].offset
            if place < 3:
                batch = twins.shared[0].batch
                assert batch is not None and isinstance(batch.prefix, SharedLayer)


@pytest.mark.parametrize("n_rows", [1, 2])
def test_rows_of_a_batch_that_go_back_before_what_they_share_attend_as_alone(module: Any, n_rows: int) -> None:
    """A loop may begin before the place where a run was forked."""
    source = Twins.filled(module, 260, None)
    rows = [source.fork(260) for _ in range(n_rows)]
    for n_back in (0, 9, 300):
        for twins in rows:
            twins.trim(min(n_back, twins.alone[0].offset - 2))
            grow(twins.shared, 1)
            grow(twins.alone, 1)
        fed = mx.array([[3 + place] for place in range(n_rows)])
        together = module(fed, cache=joined([twins.shared for twins in rows], may_batch=True))
        for place, twins in enumerate(rows):
            alone = module(fed[place : place + 1], cache=joined([twins.alone]))
            assert mx.abs(together[place] - alone[0]).max().item() < 1e-4
