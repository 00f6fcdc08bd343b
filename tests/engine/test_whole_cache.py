"""A cache that several processes hold goes into a file and out of it an array at a time; a fake group, one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.engine.kv_cache import Layer, filled_cache, layers_of, take_layers
from qwq_mlx.engine.ranks.leader import Leader
from qwq_mlx.engine.ranks.whole_cache import cache_of_whole, whole_cache
from qwq_mlx.errors import SavingError
from qwq_mlx.generate.checkpoint import file as checkpoint
from qwq_mlx.generate.checkpoint.file import read_checkpoint, write_checkpoint

N_LAYERS, N_HEADS, N_IDS, WIDTH = 12, 4, 256, 64
ARRAY_BYTES = N_HEADS * N_IDS * WIDTH * 4


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is summed; the other rank adds nothing."""
    sizes: list[int] = []

    def all_sum(array: mx.array, *, group: Any) -> mx.array:
        sizes.append(array.nbytes)
        return array * 1

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    return sizes


@pytest.fixture
def model() -> Any:
    """Rank 0 of two, with the first half of the heads."""
    told: list[dict[str, Any]] = []
    leader = Leader(None, [SimpleNamespace(send=told.append)])  # type: ignore[list-item]
    ranks = SimpleNamespace(n_layers=N_LAYERS, layers=range(N_LAYERS), kv_heads=range(N_HEADS // 2), group=None)
    module = SimpleNamespace(layers=[None] * N_LAYERS, ranks=ranks, leader=leader)
    config = SimpleNamespace(num_key_value_heads=N_HEADS, num_hidden_layers=N_LAYERS)
    return SimpleNamespace(module=module, config=config, told=told)


def _cache(model: Any) -> list[Any]:
    shape = (1, N_HEADS // 2, N_IDS, WIDTH)
    layers = [
        Layer(
            {
                name: mx.random.normal(shape, key=mx.random.key(2 * place + k))
                for k, name in enumerate(("keys", "values"))
            },
            N_IDS,
        )
        for place in range(N_LAYERS)
    ]
    cache = filled_cache(model.module, layers)
    mx.eval([layer.state for layer in cache])
    model.module.leader.mirror(cache)
    return cache


def test_one_array_beside_the_cache_is_in_memory_while_it_is_saved_and_resumed(
    sums: list[int], model: Any, tmp_path: Path
) -> None:
    cache = _cache(model)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    whole = whole_cache(model, cache, N_IDS)
    write_checkpoint(tmp_path / "run", {"steps": []}, {}, whole)
    assert mx.get_peak_memory() - before <= 4 * ARRAY_BYTES  # zeros, with the part in them, the sum, its bytes
    assert sums == [ARRAY_BYTES] * 2 * N_LAYERS
    arrays = read_checkpoint(tmp_path / "run")[1]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = cache_of_whole(model, take_layers(arrays, whole.capacities), None)
    assert mx.get_peak_memory() - before <= (4 + N_LAYERS) * ARRAY_BYTES  # half of each array of all layers stays
    assert not arrays and found is not None
    for mine, expected in zip(layers_of(found, N_IDS), layers_of(cache, N_IDS), strict=True):
        for name, array in expected.arrays.items():
            assert mx.array_equal(mine.arrays[name], array).item()
    assert [message["task"] for message in model.told] == ["gather", "scatter"]


def test_a_disk_that_is_full_leaves_all_processes_in_step(
    sums: list[int], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others give all that they were asked for, and the run goes on."""
    written, bytes_of = list[int](), checkpoint._bytes_of

    def full(array: mx.array) -> bytes:
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return bytes_of(array)

    cache = _cache(model)
    monkeypatch.setattr(checkpoint, "_bytes_of", full)
    with pytest.raises(SavingError, match="No space left"):
        write_checkpoint(tmp_path / "run", {}, {}, whole_cache(model, cache, N_IDS))
    assert len(sums) == 2 * N_LAYERS and not list(tmp_path.iterdir())
    model.module.leader.tell("new")
    with pytest.raises(SavingError, match="no regular file"):
        write_checkpoint(tmp_path, {}, {}, whole_cache(model, cache, N_IDS))
    assert len(sums) == 2 * N_LAYERS, "nobody was asked for anything"
