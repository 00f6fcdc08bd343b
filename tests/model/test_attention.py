"""Attention over a quantized cache, beside mlx_lm's own and beside MLX's fused attention of the unpacked numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.engine.kv_cache import grow, new_cache
from qwq_mlx.model.load import load_model
from qwq_mlx.model.row_caches import joined
from qwq_mlx.model.upstream import import_mlx_lm


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), hidden_size=256, n_heads=4, n_kv_heads=2)
    return load_model(folder).module


def ids_of(n_ids: int) -> mx.array:
    return mx.array([[(7 * place) % 250 for place in range(n_ids)]])


@pytest.mark.parametrize("makes_room", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_whole_room_gives_the_numbers_of_the_filled_part(module: Any, bits: int, makes_room: bool) -> None:
    ours = new_cache(module, bits)
    theirs = [import_mlx_lm("mlx_lm.models.cache").QuantizedKVCache(64, bits) for _ in ours]
    for n_ids in (3, 1, 250, 1, 1, 2, 300, 1):  # within a block, to its end, over it, and over a whole one at once
        if makes_room:
            grow(ours, n_ids)
        one, other = module(ids_of(n_ids), cache=ours), module(ids_of(n_ids), cache=theirs)
        assert ours[0].offset == theirs[0].offset
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_ids", [1, 5])
def test_heads_that_share_a_key_head_see_its_own_keys(module: Any, n_ids: int) -> None:
    cache = new_cache(module, 8)
    module(ids_of(20), cache=cache)
    attention, x = module.layers[0].self_attn, mx.random.normal((1, n_ids, 256), key=mx.random.key(0))
    queries = attention.rope(attention.q_proj(x).reshape(1, n_ids, 4, 64).transpose(0, 2, 1, 3), offset=20)
    found = attention(x, cache=cache[0])  # without a mask it asks the cache
    keys, values = (
        mx.dequantize(*part, group_size=64, bits=8)[:, :, : 20 + n_ids] for part in (cache[0].keys, cache[0].values)
    )
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=64**-0.5, mask="causal")
    expected = attention.o_proj(expected.transpose(0, 2, 1, 3).reshape(1, n_ids, -1))
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5)


def test_what_lies_in_the_room_unfilled_is_not_seen(module: Any) -> None:
    clean, dirty = new_cache(module, 8), new_cache(module, 8)
    for cache in (clean, dirty):
        module(ids_of(20), cache=cache)
    for layer in dirty:
        module_ids = layer.keys[0].shape[2]
        rest = mx.arange(module_ids)[None, None, :, None] >= 20
        for name in ("keys", "values"):
            codes, scales, biases = getattr(layer, name)
            setattr(layer, name, (mx.where(rest, 2**31, codes), mx.where(rest, 9.0, scales), biases))
    one, other = module(ids_of(1), cache=clean), module(ids_of(1), cache=dirty)
    np.testing.assert_array_equal(np.array(one), np.array(other))


def test_a_plain_cache_goes_through_mlx_lms_attention(module: Any) -> None:
    home = import_mlx_lm("mlx_lm.models.qwen2")
    cache = new_cache(module)
    x = mx.random.normal((1, 7, 256), key=mx.random.key(1))
    attention = module.layers[0].self_attn
    found = attention(x, "causal", cache[0])
    expected = home.Attention.__call__(attention, x, "causal", new_cache(module)[0])
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("bits", [None, 8])
def test_ids_of_a_row_that_attend_at_once_see_what_they_see_one_by_one(module: Any, bits: int | None) -> None:
    """Two rows of other lengths feed 3 ids and 1: as on Metal, and as where bits count."""
    logits = []
    for is_exact in (True, False):
        caches = [new_cache(module, bits) for _ in range(2)]
        for cache, n_ids in zip(caches, (20, 33), strict=True):
            module(ids_of(n_ids), cache=cache)
        layers = joined(caches, [3, 1])
        for layer in layers:
            layer.is_exact = is_exact
        logits.append(module(mx.array([[5], [9], [11], [4]]), cache=layers))
        assert [cache[0].offset for cache in caches] == [23, 34]
    np.testing.assert_allclose(np.array(logits[0]), np.array(logits[1]), rtol=0, atol=1e-5)
    alone = new_cache(module, bits)
    module(ids_of(20), cache=alone)
    for place, token_id in enumerate((5, 9, 11)):
        expected = module(mx.array([[token_id]]), cache=alone)
        assert mx.array_equal(logits[0][place], expected[0])
