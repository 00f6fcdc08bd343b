"""Rows that attend in a batch beside the same rows alone. On the CPU, where the engine itself makes no batches."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from configs import SMALL

from qwq_mlx.bench.models import random_module
from qwq_mlx.engine.kv_cache import filled_cache, grow, layers_of, new_cache
from qwq_mlx.model.memory.activations import CACHE_STEP
from qwq_mlx.model.row_batches import size_class
from qwq_mlx.model.row_caches import joined

CONFIG = replace(SMALL, hidden_size=64, intermediate_size=64, vocab_size=32, max_position_embeddings=1024)


class Pair:
    """The same ids in a cache that is batched and in one that never is."""

    def __init__(self, module: Any, n_ids: int) -> None:
        self.module = module
        self.ids = [(3 * place + n_ids) % CONFIG.vocab_size for place in range(n_ids)]
        self.caches = [new_cache(module), new_cache(module)]
        for cache in self.caches:
            mx.eval(module(mx.array([self.ids]), cache=cache))


@pytest.fixture(scope="module")
def module() -> Any:
    return random_module(CONFIG, {}, "float32", seed=1)


def step(module: Any, pairs: list[Pair], ids: list[int]) -> None:
    """A pass of all pairs in a batch, and one of each alone: the logits are the same."""
    rows = [pair.caches[0] for pair in pairs]
    for row in rows:
        grow(row, 1)
    together = module(mx.array([[each] for each in ids]), cache=joined(rows, may_batch=True))
    for place, (pair, token_id) in enumerate(zip(pairs, ids, strict=True)):
        grow(pair.caches[1], 1)
        alone = module(mx.array([[token_id]]), cache=pair.caches[1])
        assert mx.abs(together[place] - alone[0]).max().item() < 1e-4
        assert pair.caches[0][0].offset == pair.caches[1][0].offset


def test_rows_of_one_length_and_of_several_attend_in_a_batch_as_alone(module: Any) -> None:
    pairs = [Pair(module, 5), Pair(module, 5), Pair(module, 9)]
    for ids in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        step(module, pairs, ids)
    batch = pairs[0].caches[0][0].batch
    assert batch is not None and len(batch.members) == 3
    assert all(each.caches[0][0].batch is batch for each in pairs), "they stay in one batch"


def test_rows_have_what_they_had_where_a_pass_fails(module: Any) -> None:
    """What a pass computes is computed as it is written on the CPU: that may fail, or be interrupted."""
    pairs = [Pair(module, 5), Pair(module, 9)]
    step(module, pairs, [1, 2])
    for n_each in ([1, 1], [1, 2]):
        rows = [pair.caches[0] for pair in pairs]
        layer = joined(rows, n_each, may_batch=True)[0]
        [group] = layer.groups
        none = mx.zeros((2, 3, max(n_each), 5))  # no heads of this model
        with pytest.raises(ValueError):
            group.cache.append(none, none, group.writing)
    step(module, pairs, [3, 4])


def test_rows_that_feed_several_ids_attend_in_a_batch_as_alone(module: Any) -> None:
    """As many each, or not, beside rows that feed one, and again after drafts that were cut off."""
    pairs = [Pair(module, n_ids) for n_ids in (5, 5, 9, 3)]
    for n_fed, n_cut in (((3, 3, 3, 3), 0), ((1, 4, 2, 1), 1), ((2, 1, 1, 5), 1), ((1, 1, 1, 1), 0), ((4, 1, 3, 2), 0)):
        rows = [pair.caches[0] for pair in pairs]
        fed = [[(7 * row + place) % CONFIG.vocab_size for place in range(n)] for row, n in enumerate(n_fed)]
        for row, ids in zip(rows, fed, strict=True):
            grow(row, len(ids))
        flat = mx.array([[each] for ids in fed for each in ids])
        together = module(flat, cache=joined(rows, n_fed, may_batch=True))
        first = 0
        for pair, ids in zip(pairs, fed, strict=True):
            grow(pair.caches[1], len(ids))
            alone = module(mx.array([ids]), cache=pair.caches[1])
            assert mx.abs(together[first : first + len(ids), 0] - alone[0]).max().item() < 1e-4
            first += len(ids)
            for cache in pair.caches:
                assert cache[0].offset == pair.caches[1][0].offset
                for layer in cache:
                    layer.trim(min(n_cut, len(ids) - 1))
        assert all(pair.caches[0][0].batch is pairs[0].caches[0][0].batch is not None for pair in pairs)


def test_a_row_without_room_for_the_longest_draft_attends_alone(module: Any) -> None:
    pairs = [Pair(module, n_ids) for n_ids in (CACHE_STEP - 3, 5, 6)]
    rows, n_fed = [pair.caches[0] for pair in pairs], (2, 4, 1)
    flat = mx.array([[place] for place in range(sum(n_fed))])
    together = module(flat, cache=joined(rows, n_fed, may_batch=True))
    assert rows[0][0].batch is None and rows[1][0].batch is not None and rows[1][0].batch is rows[2][0].batch
    first = 0
    for pair, n in zip(pairs, n_fed, strict=True):
        alone = module(flat[first : first + n].reshape(1, -1), cache=pair.caches[1])
        assert mx.abs(together[first : first + n, 0] - alone[0]).max().item() < 1e-4
        first += n


def test_rows_leave_and_enter_a_batch_in_any_order(module: Any) -> None:
    pairs = [Pair(module, n_ids) for n_ids in (3, 4, 5, 6)]
    step(module, pairs[:3], [1, 2, 3])
    step(module, [pairs[2], pairs[0]], [4, 5])  # one waits, the others change places
    step(module, [pairs[3], pairs[1], pairs[2]], [6, 7, 8])
    step(module, [pairs[1]], [9])
    step(module, pairs, [1, 2, 3, 4])
    step(module, [pairs[1]], [5])  # alone, and back among the same ones
    step(module, pairs, [6, 7, 8, 9])


def test_rows_of_about_one_length_have_the_room_of_the_longest(module: Any) -> None:
    pairs = [Pair(module, n_ids) for n_ids in (CACHE_STEP - 2, CACHE_STEP - 2, 7, 3 * CACHE_STEP - 1)]
    for token_id in range(4):  # the last one crosses a block, and then the first two do
        step(module, pairs, [token_id, token_id + 1, token_id + 2, token_id + 3])
    batch = pairs[0].caches[0][0].batch
    assert batch is not None and all(pair.caches[0][0].batch is batch for pair in pairs)
    assert all(pair.caches[0][0].room == 4 * CACHE_STEP for pair in pairs)
    pairs[2].caches[0][0].leave()
    assert pairs[2].caches[0][0].room == CACHE_STEP
    step(module, pairs, [5, 6, 7, 8])
    for pair in pairs:
        assert mx.abs(pair.caches[0][1].keys[:, :, :7] - pair.caches[1][1].keys[:, :, :7]).max().item() < 1e-5


def test_a_batch_grows_for_all_of_its_rows_and_stays_the_same_one(module: Any) -> None:
    pairs = [Pair(module, n_ids) for n_ids in (4 * CACHE_STEP - 2, 4 * CACHE_STEP - 3, 7, 8)]
    step(module, pairs, [0, 1, 2, 3])
    batch = pairs[0].caches[0][0].batch
    for token_id in range(4):
        step(module, pairs, [token_id, token_id + 1, token_id + 2, token_id + 3])
    assert batch is not None and all(pair.caches[0][0].batch is batch for pair in pairs)
    assert all(pair.caches[0][0].room == 5 * CACHE_STEP for pair in pairs)
    newcomer = Pair(module, 6)  # no row would choose such a batch now
    step(module, [*pairs, newcomer], [5, 6, 7, 8, 9])
    assert newcomer.caches[0][0].batch is None


@pytest.mark.parametrize("n_shared", [0, 300])
def test_rows_of_one_class_never_have_more_than_a_quarter_or_four_blocks_too_many(n_shared: int) -> None:
    class Cache:
        def __init__(self, room: int) -> None:
            self.room, self.n_shared = room + n_shared, n_shared

    rooms: dict[Any, list[int]] = {}
    for n_blocks in range(1, 200):
        rooms.setdefault(size_class(Cache(n_blocks * CACHE_STEP)), []).append(n_blocks)
    assert len(rooms) < 25
    assert all(max(each) - min(each) < max(4, min(each) / 4) for each in rooms.values())


def test_a_row_that_was_cut_back_is_fed_other_ids_in_the_batch(module: Any) -> None:
    pairs = [Pair(module, 6), Pair(module, 6)]
    step(module, pairs, [1, 2])
    step(module, pairs, [3, 4])
    for cache in pairs[0].caches:
        for layer in cache:
            layer.trim(2)
    step(module, pairs, [5, 6])
    assert pairs[0].caches[0][0].batch is not None


def test_who_reads_a_rows_cache_sees_what_it_holds_alone(module: Any) -> None:
    pairs = [Pair(module, 6), Pair(module, 7)]
    step(module, pairs, [1, 2])
    fork = filled_cache(module, layers_of(pairs[1].caches[0], 8))
    for mine, alone in zip(fork, pairs[1].caches[1], strict=True):
        assert mx.abs(mine.keys[:, :, :8] - alone.keys[:, :, :8]).max().item() < 1e-5
        assert mx.abs(mine.values[:, :, :8] - alone.values[:, :, :8]).max().item() < 1e-5
    step(module, pairs, [3, 4])


def test_a_batch_holds_each_row_once(module: Any) -> None:
    pairs = [Pair(module, 6), Pair(module, 7)]
    step(module, pairs, [1, 2])
    for pair in pairs:
        assert all(layer._keys is None and layer._values is None for layer in pair.caches[0])


def test_a_batch_goes_with_the_last_of_its_rows(module: Any) -> None:
    pairs = [Pair(module, 6), Pair(module, 7), Pair(module, 8)]
    step(module, pairs, [1, 2, 3])
    batch = weakref.ref(pairs[0].caches[0][0].batch)
    gc.disable()  # nothing is to wait for it
    try:
        del pairs[1:]
        assert batch() is not None
        step(module, pairs, [4])
        del pairs[:]
        assert batch() is None
    finally:
        gc.enable()


def test_quantized_caches_are_not_batched(module: Any) -> None:
    wide = replace(CONFIG, hidden_size=256)
    module = random_module(wide, {}, "float32", seed=1)
    rows = [new_cache(module, 8) for _ in range(2)]
    for row in rows:
        module(mx.array([[1, 2, 3]]), cache=row)
    together = module(mx.array([[4], [4]]), cache=joined(rows, may_batch=True))
    assert mx.array_equal(together[0], together[1]).item()
