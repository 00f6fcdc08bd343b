"""Rows of a pass that attend in place, as on an NVIDIA GPU, with a plain twin of the kernel, beside mlx_lm's layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from attention_in_place import CONFIG, module_in_place

from qwq_mlx.bench.models import random_module
from qwq_mlx.engine.kv_cache import fork_cache, layers_of, new_cache, take_out_of_batch
from qwq_mlx.engine.model_runner import run_pass
from qwq_mlx.model import rotations
from qwq_mlx.model.rotations import rotations_in_place


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_in_place(monkeypatch)


class Text:
    """A row, and its ids."""

    def __init__(self, module: Any, n_ids: int, cache: Any = None) -> None:
        self.module, self.cache = module, new_cache(module) if cache is None else cache
        self.ids = [(3 * place + n_ids) % CONFIG.vocab_size for place in range(n_ids)]
        if cache is None:
            mx.eval(module(mx.array([self.ids]), cache=self.cache))

    def logits(self) -> mx.array:
        """Behind all ids, in one pass of mlx_lm's layers."""
        return self.module(mx.array([self.ids]))[0]


def step(texts: Sequence[Text], n_each: Sequence[int]) -> mx.array:
    """A pass of new ids of each row; each id's logits are those of its row alone. (ids, vocab)"""
    rows = list(zip(texts, n_each, strict=True))
    fed = [[(7 * len(text.ids) + 5 * n) % CONFIG.vocab_size for n in range(n_own)] for text, n_own in rows]
    flat = mx.array([[token_id] for ids in fed for token_id in ids])
    found = run_pass(texts[0].module, flat, [text.cache for text in texts], n_each, batches_from=1)[:, -1]
    for text, ids, end in zip(texts, fed, itertools.accumulate(n_each), strict=True):
        text.ids += ids
        assert text.cache[0].offset == text.cache[-1].offset == len(text.ids)
        expected = text.logits()[-len(ids) :]
        assert mx.abs(found[end - len(ids) : end] - expected).max().item() < 0.05 * mx.abs(expected).max().item()
    return found


def test_rows_of_any_length_feed_any_number_of_ids_in_one_batch(module: Any) -> None:
    texts = [Text(module, n) for n in (5, 5, 90)]
    for n_each in ([1, 1, 1], [3, 1, 2], [1, 4, 1], [1, 1, 1]):
        step(texts, n_each)
    [batch] = {id(text.cache[0].batch) for text in texts}
    assert batch != id(None)


def test_a_row_has_the_bits_that_it_has_alone(module: Any) -> None:
    alone, *texts = [Text(module, n) for n in (9, 9, 300, 20)]
    for n in (1, 2, 1):
        assert mx.array_equal(step(texts, [n, 1, 3])[:n], step([alone], [n]))


def test_rows_whose_rooms_differ_much_attend_apart_in_one_pass(module: Any) -> None:
    texts = [Text(module, n) for n in (1500, 5, 1500, 7)]
    for n_each in ([1, 1, 1, 1], [2, 3, 1, 1]):
        step(texts, n_each)
    assert len({id(text.cache[0].batch) for text in texts}) == 2


def test_some_rows_of_a_batch_make_passes_of_their_own_and_nothing_is_copied(module: Any) -> None:
    texts = [Text(module, n) for n in (5, 8, 11)]
    step(texts, [1, 1, 1])
    batch = texts[0].cache[0].batch
    for among in (texts[1:], texts[:1], texts[::-1]):
        step(among, [1] * len(among))
        assert all(text.cache[0].batch is batch for text in texts)


def test_a_row_that_comes_takes_the_place_of_one_that_left(module: Any) -> None:
    texts = [Text(module, n) for n in (5, 8, 11)]
    step(texts, [1, 1, 1])
    batch = texts[0].cache[0].batch
    take_out_of_batch(texts[1].cache)
    left = texts.pop(1)
    texts.append(Text(module, 20))
    step(texts, [1, 1, 1])
    assert texts[-1].cache[0].batch is batch and texts[-1].cache[0].place == 1
    step([left], [1])  # it has all of its own positions still
    texts.append(Text(module, 30))
    step(texts, [1] * 4)  # no place is left
    assert all(text.cache[0].batch is not batch for text in texts)


def test_a_batch_of_which_most_rows_left_is_made_anew(module: Any) -> None:
    texts = [Text(module, n) for n in range(5, 10)]
    step(texts, [1] * 5)
    before = texts[0].cache[0].batch
    del texts[2:]
    step(texts, [1, 1])
    assert texts[0].cache[0].batch is not before and len(texts[0].cache[0].batch.members) == 2


def test_drafts_are_taken_back_and_written_anew(module: Any) -> None:
    texts = [Text(module, n) for n in (5, 40)]
    step(texts, [4, 2])
    for text, n in zip(texts, (3, 1), strict=True):
        for layer in text.cache:
            layer.trim(n)
        del text.ids[-n:]
    step(texts, [1, 3])


def test_the_cache_grows_for_all_rows_of_a_batch(module: Any) -> None:
    texts = [Text(module, n) for n in (255, 40)]
    for _ in range(3):
        step(texts, [1, 1])
    assert texts[0].cache[0].batch is texts[1].cache[0].batch and texts[0].cache[0].room == 512


def test_forks_attend_to_what_they_share_and_the_one_that_they_come_from_goes_on(module: Any) -> None:
    source = Text(module, 300)
    step([source], [1])
    forks = [Text(module, 301, fork_cache(module, source.cache, 301)) for _ in range(3)]
    for fork in forks:
        fork.ids = list(source.ids)
    for n_each in ([1, 2, 1, 1], [1, 1, 1, 3]):
        step([source, *forks], n_each)
    assert forks[0].cache[0].n_shared == 301


def test_what_a_saved_run_takes_of_a_cache_in_a_batch_is_what_it_has_alone(module: Any) -> None:
    alone, *texts = [Text(module, n) for n in (9, 9, 60)]
    step(texts, [2, 1])
    step([alone], [2])
    for ours, theirs in zip(layers_of(texts[0].cache, 11), layers_of(alone.cache, 11), strict=True):
        assert ours.capacity == theirs.capacity
        assert all(mx.array_equal(ours.arrays[name], theirs.arrays[name]) for name in ("keys", "values"))


def test_models_that_are_not_made_for_it_do_not_attend_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rotations_in_place(random_module(CONFIG, {}, "bfloat16", seed=1)) is None, "this is a CPU"
    monkeypatch.setattr(rotations, "cuda_kernels_run", lambda: True)
    assert rotations_in_place(random_module(CONFIG, {}, "float32", seed=1)) is None
    one_key_head = replace(CONFIG, num_key_value_heads=1)
    assert rotations_in_place(random_module(one_key_head, {}, "bfloat16", seed=1)) is None


@pytest.mark.parametrize("n", [3, 40])
def test_ids_of_one_row_that_are_fed_at_once_are_all_in_its_cache(module: Any, n: int) -> None:
    """As ids are that are forced upon a row; also behind what it shares, and among rows of a batch."""
    source, other = Text(module, 300), Text(module, 20)
    forks = [Text(module, 300, fork_cache(module, source.cache, 300)) for _ in range(2)]
    step([source, other, *forks], [1] * 4)
    ids = [3 * place % CONFIG.vocab_size for place in range(n)]
    for text in (source, *forks):
        found = run_pass(module, mx.array([ids]), [text.cache], [n], batches_from=1)
        text.ids += ids
        expected = text.logits()[-n:]
        assert mx.abs(found[0] - expected).max().item() < 0.05 * mx.abs(expected).max().item()
    step([source, other, *forks], [1] * 4)


def test_ids_that_are_fed_at_once_have_the_bits_that_they_have_one_by_one(module: Any) -> None:
    first, second = Text(module, 30), Text(module, 30)
    ids = [3, 1, 4, 1, 5]
    at_once = run_pass(module, mx.array([ids]), [first.cache], [5], batches_from=None)[0]
    one_by_one = [run_pass(module, mx.array([[each]]), [second.cache], [1], batches_from=None)[0, 0] for each in ids]
    assert mx.array_equal(at_once, mx.stack(one_by_one))


def test_a_row_alone_has_arrays_of_its_own_in_its_batch(module: Any) -> None:
    """Else what somebody has of them, as a save does, would change when the row goes back and on otherwise."""
    text = Text(module, 9)
    held = text.cache[0].keys[..., :9, :]
    before = mx.array(held)
    mx.eval(held, before)
    step([text], [1])
    for layer in text.cache:
        layer.trim(5)
    del text.ids[-5:]
    step([text], [3])
    assert mx.array_equal(held, before)


def test_a_row_alone_loses_nothing_where_its_values_lie_as_its_prompt_left_them(module: Any) -> None:
    """A prompt of whole blocks leaves values with gaps between the heads, of which a kernel would write into a copy."""
    text = Text(module, 256)
    for layer in text.cache:
        layer.trim(6)
    del text.ids[-6:]
    for _ in range(2):
        step([text], [1])


def test_nothing_of_who_had_a_place_is_left_for_who_takes_it(module: Any) -> None:
    """Rows beside which not all attend in place read all room, and not a number times nothing is none."""
    texts = [Text(module, n) for n in (5, 300, 11)]
    step(texts, [1, 1, 1])
    for layer in texts[1].cache:
        for name in ("keys", "values"):
            layer.batch.arrays[name][layer.place] = mx.full(layer.batch.arrays[name].shape[1:], float("nan"))
    take_out_of_batch(texts[1].cache)
    texts[1] = Text(module, 20)
    step(texts, [1, 1, 1])
    assert texts[1].cache[0].place == 1
    for layer in texts[1].cache:
        assert mx.isfinite(layer.batch.arrays["values"]).all().item()


@pytest.mark.parametrize("n_each", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("n_shared", [0, 300])
def test_rows_beside_an_empty_and_a_quantized_one_have_the_bits_that_they_have_alone(
    module: Any, n_each: tuple[int, int, int], n_shared: int
) -> None:
    source = Text(module, max(n_shared, 9))
    own = [Text(module, len(source.ids), fork_cache(module, source.cache, len(source.ids))) for _ in range(2)]
    for text in own:
        text.ids = list(source.ids)
    alone, beside = own
    others = [Text(module, 0, new_cache(module)), Text(module, 0, new_cache(module, 8))]
    run_pass(module, mx.array([[5, 6, 7]]), [others[1].cache], [3], batches_from=1)
    for _ in range(2):
        n_before = len(beside.ids)
        fed = [[(7 * n_before + 5 * n) % CONFIG.vocab_size for n in range(n_own)] for n_own in n_each]
        flat = mx.array([[token_id] for ids in (fed[1], fed[0], fed[2]) for token_id in ids])
        caches = [others[0].cache, beside.cache, others[1].cache]
        n_in_order = [n_each[1], n_each[0], n_each[2]]
        found = run_pass(module, flat, caches, n_in_order, batches_from=1)[n_each[1] : n_each[1] + n_each[0], -1]
        assert mx.array_equal(found, step([alone], [n_each[0]]))
        beside.ids += fed[0]
        assert [cache[-1].offset for cache in caches] == [cache[0].offset for cache in caches]
