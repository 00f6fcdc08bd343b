"""What the ranks of a split model hold and compute, in one process: a fake group hands their messages on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.model_runner import feed_prompt
from qwq_mlx.errors import OptionError
from qwq_mlx.model import ranks
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import build_module, load_model
from qwq_mlx.model.memory.plan import Workload, plan_memory
from qwq_mlx.model.ranks import load_part
from qwq_mlx.model.row_caches import joined
from qwq_mlx.model.split import Split, tensor_split
from qwq_mlx.model.tensor_bytes import array_of

IDS = [5, 17, 300, 4, 4, 81, 220, 9, 12, 250, 33]


@dataclass(frozen=True)
class Group:
    """One of the ranks, as MLX's groups tell it."""

    n: int
    size: Callable[[], int]
    rank: Callable[[], int]


def group(rank: int, size: int) -> Group:
    return Group(size, lambda: size, lambda: rank)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mx.array]]:
    """Those that were sent and not received; the ranks are called one after another, the first stage first."""
    sent: list[mx.array] = []

    def send(array: mx.array, to: int, *, group: Group) -> mx.array:
        assert to == group.rank() - 1
        sent.append(array)
        return array

    def recv(shape: tuple[int, ...], dtype: Any, source: int, *, group: Group) -> mx.array:
        array = sent.pop(0)
        assert source == group.rank() + 1 and (array.shape, array.dtype) == (shape, dtype)
        return array

    monkeypatch.setattr(mx.distributed, "send", send)
    monkeypatch.setattr(mx.distributed, "recv", recv)
    yield sent
    assert not sent


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("n_layers", [(1, 4), (2, 1, 2)])
def test_the_stages_of_a_pipeline_give_the_bits_of_one_process(
    messages: list[mx.array], tmp_path: Path, n_layers: tuple[int, ...], kv_bits: int | None, is_tied: bool
) -> None:
    """Prompts in chunks, steps of one row, of two rows together, and of rows that check drafts."""
    folder = write_tiny_checkpoint(
        tmp_path / "m", n_layers=5, tie=is_tied, hidden_size=256 if kv_bits else 128, n_kv_heads=2
    )
    whole = load_model(folder).module
    n, split = len(n_layers), Split("pipeline", n_layers)
    stages = [load_model(folder, group=group(rank, n), split=split).module for rank in reversed(range(n))]
    holds = [rank.ranks.layers for rank in reversed(stages)]
    assert [place for layers in reversed(holds) for place in layers] == list(range(5))
    rows = 2
    expected_caches = [new_cache(whole, kv_bits) for _ in range(rows)]
    caches = [[new_cache(stage, kv_bits) for _ in range(rows)] for stage in stages]
    for row, length in enumerate((9, 7)):
        for first in range(0, length, 4):
            ids = mx.array([IDS[first : min(first + 4, length)]])
            expected = whole.model(ids, cache=expected_caches[row])
            for place, stage in enumerate(stages):
                found = stage.model(ids, cache=caches[place][row])
            assert np.array_equal(np.array(found), np.array(expected))
    for n_fed in ([1, 1], [1, 3]):
        ids = mx.array([[token_id] for token_id in IDS[: sum(n_fed)]])
        expected = whole(ids, cache=joined(expected_caches, n_fed))
        for place, stage in enumerate(stages):
            run = stage if place == n - 1 else stage.model
            found = run(ids, cache=joined(caches[place], n_fed))
        assert np.array_equal(np.array(found), np.array(expected)) and found.shape == (sum(n_fed), 1, 320)


def test_a_stage_reads_a_prompt_layer_by_layer_and_sends_it_then(
    messages: list[mx.array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated first, what it sends would put all layers and their intermediates into the device's queue."""
    folder = write_tiny_checkpoint(tmp_path / "m", n_layers=3)
    stage = load_model(folder, group=group(1, 2), split=Split("pipeline", (1, 2))).module
    cache, evaluated, evaluate = new_cache(stage), list[Any](), mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluated.append(arrays[0]), evaluate(*arrays)))
    feed_prompt(stage, cache, IDS)
    sent = messages.pop()
    assert evaluated[-1] is sent and all(each is not sent for each in evaluated[:-1])
    assert len(evaluated) == 3, "two layers and what is sent"


def test_a_rank_has_what_it_needs_and_nothing_else() -> None:
    files = open_model_folder(pocket_checkpoint())
    split = Split("pipeline", (3, 3, 2))
    names = [{name for name in files.checkpoint.tensors if split.holds(name, rank, files.config)} for rank in range(3)]
    assert set.union(*names) == set(files.checkpoint.tensors) and sum(map(len, names)) == len(files.checkpoint.tensors)
    assert {"lm_head.weight", "model.norm.weight", "model.layers.7.mlp.up_proj.weight"} <= names[0]
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= names[2]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (lambda: Split("pipeline", (4, 3)), r"has \[4, 3\] layers, 7 together, expected 8"),
        (lambda: Split("pipeline", (8, 0)), "at least one each"),
        (lambda: Split("tensor", (8, 7)), "the same number for each process"),
        (lambda: Split("pipeline", (4, 2, 2)), "is for 3 processes, expected 2"),
    ],
)
def test_a_split_that_is_not_the_model_s_is_refused(split: Callable[[], Split], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        load_model(pocket_checkpoint(), group=group(0, 2), split=split())


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_rank_holds_no_more_than_its_plan_while_it_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's arrays at their highest within each tensor, and numpy's bytes beside them: at most 1.05 of the plan."""
    held: list[int] = []

    def noted(raw: Any, *arguments: Any) -> Any:
        mx.reset_peak_memory()
        array = array_of(raw, *arguments)
        held.append(mx.get_peak_memory() + raw.nbytes)
        return array

    monkeypatch.setattr(ranks, "array_of", noted)
    files = open_model_folder(pocket_checkpoint())
    split = tensor_split(files.config, 2) if kind == "tensor" else Split("pipeline", (2, 6))
    for rank in range(2):
        workload = Workload(context=1, prefill_step=1, split=split, rank=rank, compute_type="float32")
        plan = plan_memory(files, workload, backend="cpu")
        module = build_module(files.config, files.packed)
        held.clear()
        before, shares = mx.get_active_memory(), list[float]()
        load_part(module, files, split, group(rank, 2), "float32", shares.append)
        assert max(held) - before <= 1.05 * (plan.weights_bytes + plan.load_bytes)
        assert mx.get_active_memory() - before == pytest.approx(plan.weights_bytes, rel=0.01)
        assert shares == sorted(shares) and shares[-1] == 1
