from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx import facts
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import FitError, OptionError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.generate.batch import plan_width
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.memory.fit import fitted
from qwq_mlx.model.memory.plan import Workload, metal_limit_bytes, plan_memory, shape_of_facts
from qwq_mlx.model.memory.splits import choose_split, plan_ranks
from qwq_mlx.model.ranks import read_part
from qwq_mlx.model.split import Split, SplitKind, check_split, possible_ranks, split_axis, tensor_split
from qwq_mlx.options import Limits, Sampling

QWQ = shape_of_facts(facts.QWQ_32B_PREVIEW)


def test_the_32b_is_held_by_2_4_or_8_processes_as_its_key_heads_say() -> None:
    assert possible_ranks(QWQ.config, QWQ.packed) == [1, 2, 4, 8]
    with pytest.raises(OptionError, match=r"40 attention heads are no multiple of 3\. Possible: 2, 4, 8\. A pipeline"):
        check_split(tensor_split(QWQ.config, 3), QWQ.config, QWQ.packed)
    check_split(Split("pipeline", (22, 21, 21)), QWQ.config, QWQ.packed)


def test_columns_are_split_between_groups_only() -> None:
    wide = {path: replace(packing, group_size=128) for path, packing in QWQ.packed.items()}
    assert possible_ranks(QWQ.config, wide) == [1, 2, 4, 8]  # 27,648 / 8 is 27 groups of 128, 5,120 / 8 is 5
    odd = replace(QWQ.config, intermediate_size=64 * 6)
    assert possible_ranks(odd, QWQ.packed) == [1, 2]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_parts_of_all_ranks_are_the_tensor(n_ranks: int) -> None:
    checkpoint = open_checkpoint(pocket_checkpoint())
    whole = {name: array for shard in checkpoint.shards for name, array in mx.load(str(shard.path)).items()}
    for name, (shard, entry) in checkpoint.tensors.items():
        axis = split_axis(name)
        parts = [read_part(shard, entry, axis, rank, n_ranks, "float32") for rank in range(n_ranks)]
        found = parts[0] if axis is None else mx.concatenate(parts, axis=axis)
        assert np.array_equal(np.asarray(found), np.asarray(whole[name].astype(mx.float32))), name


def test_a_process_of_two_plans_half_of_layers_and_cache_beside_whole_embeddings() -> None:
    splits = (None, tensor_split(QWQ.config, 2))
    one, two = (plan_memory(QWQ, Workload(split=split, context=4096), backend="metal") for split in splits)
    embeddings = 2 * (152_064 * 5_120 // 2 + 152_064 * 5_120 // 64 * 4)
    assert two.kv_bytes * 2 == one.kv_bytes
    assert abs((two.weights_bytes - embeddings) * 2 - (one.weights_bytes - embeddings)) < 2_000_000  # norms are whole
    with pytest.raises(OptionError, match="5 processes cannot hold this model tensor parallel"):
        plan_memory(QWQ, Workload(split=tensor_split(QWQ.config, 5)), backend="metal")


def test_the_split_is_the_one_asked_for_or_the_one_that_reaches_the_longer_context() -> None:
    small, alike, large = ([metal_limit_bytes(gib << 30) for gib in sizes] for sizes in ((16, 24), (24, 24), (64, 64)))

    def kind(limits: list[int], wanted: SplitKind | None = None, context: int | None = None) -> str:
        return choose_split(QWQ, Workload(context=context), limits, kind=wanted).kind

    def reached(limits: list[int], wanted: SplitKind) -> int:
        split = choose_split(QWQ, Workload(), limits, kind=wanted)
        return min(plan.largest_context for plan in plan_ranks(QWQ, Workload(), split, limits))

    assert kind(large) == "tensor", "both reach the model's own context"
    assert reached(small, "pipeline") > reached(small, "tensor") > 2
    assert kind(small) == "pipeline"
    assert kind(small, context=4096) == "tensor", "which is long enough for that"
    assert kind(small, "tensor") == "tensor"
    assert (kind(alike) == "tensor") == (reached(alike, "tensor") >= min(32_768, reached(alike, "pipeline")))
    assert kind(large, "pipeline") == "pipeline"
    with pytest.raises(OptionError, match="no multiple of 3"):
        choose_split(QWQ, Workload(), [*alike, alike[0]], kind="tensor")


def test_rows_fit_every_process_though_another_one_binds_with_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac of 8 GiB binds by its buffers, one of 24 GiB, which has most layers, by the caches of many rows."""
    monkeypatch.setattr("qwq_mlx.generate.batch.backend_name", lambda: "metal")
    split, limits = Split("pipeline", (12, 52)), [metal_limit_bytes(gib << 30) for gib in (8, 24)]
    alone = fitted(
        QWQ, Limits(context=1024, kv_bits=8), limit_bytes=None, backend="metal", split=split, of_ranks=limits
    ).plan
    ranks = SimpleNamespace(limits=limits)
    model: Any = SimpleNamespace(config=QWQ.config, packed=QWQ.packed, module=SimpleNamespace(ranks=ranks))
    held = 200_000_000  # by rank 0, which has 12 of 64 layers
    free = [limits[0] - held, limits[1] - held * 52 // 12]

    def all_fit(n: int) -> bool:
        workload = replace(alone.workload, context=1024, n_sequences=n)
        return all(plan.fits for plan in plan_ranks(QWQ, workload, split, free))

    with pytest.raises(FitError, match="memory of process 1, which holds layers 0 to 51") as caught:
        plan_width(model, alone, 20, 20, limit_bytes=limits[0] - held)
    n_rows = int(str(caught.value).partition("The largest `width` that fits is ")[2].partition(";")[0])
    assert n_rows > 1 and all_fit(n_rows) and not all_fit(n_rows + 1)
    plan = plan_width(model, alone, n_rows, n_rows, limit_bytes=limits[0] - held)
    assert (plan.workload.rank, alone.workload.rank, plan.workload.n_sequences) == (1, 0, n_rows)


def test_what_is_read_of_a_split_matrix_is_the_rank_s_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr("qwq_mlx.files.rows.os.pread", lambda fd, n, at: _counted(read, fd, n, at))
    checkpoint = open_checkpoint(pocket_checkpoint())
    name = "model.layers.0.mlp.gate_proj.weight"
    shard, entry = checkpoint.tensors[name]
    read.clear()
    read_part(shard, entry, split_axis(name), 1, 2, "bfloat16")
    assert sum(read) * 2 == entry.end - entry.start


_pread = os.pread


def _counted(read: list[int], fd: int, n: int, at: int) -> bytes:
    data: bytes = _pread(fd, n, at)
    read.append(len(data))
    return data


def test_a_group_of_one_process_is_as_none(tmp_path: Path) -> None:
    """A program for `mlx.launch` that is started without it: its runs can be saved."""
    reasoner = load(pocket_checkpoint(), group=mx.distributed.init(), verify=False)
    run = reasoner.stream("x", sampling=Sampling(temperature=0), limits=Limits(max_tokens=3))
    ids = [step.id for step in run]
    run.save(tmp_path / "run")
    rest = [step.id for step in reasoner.resume(tmp_path / "run", max_tokens=4)]
    assert len(ids) == 3 and len(rest) == 1
