"""Several processes hold one model over MLX's ring on this machine, and write what one process writes."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import rank_program
from checkpoints import write_tiny_checkpoint

from qwq_mlx import load
from qwq_mlx.cli.host_check import checked_hosts
from qwq_mlx.cli.hosts import parse_hosts
from qwq_mlx.cli.launch import Launch
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.engine.ranks.leader import Leader
from qwq_mlx.engine.ranks.link import Link
from qwq_mlx.errors import FitError, RankError
from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.files.model_identity import machine_name, model_identity, versions
from qwq_mlx.generate import following, load_plan
from qwq_mlx.generate.checkpoint.file import read_checkpoint
from qwq_mlx.generate.following import _planned, limits_of_ranks
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.memory.plan import RESERVE_BYTES, Workload, metal_limit_bytes, plan_memory, shape_of_facts
from qwq_mlx.model.split import Split
from qwq_mlx.options import Limits


def _cache_of(path: Path) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in read_checkpoint(path)[1].items()}


def test_two_and_four_processes_do_what_one_does_and_go_on_with_each_other_s_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, batches, drafts by texts and by a model, budgets, an 8-bit cache, forks, votes, asking, stopping, saving
    and resuming."""
    model = tmp_path / "model"
    write_tiny_checkpoint(model, n_layers=1, hidden_size=512, intermediate_size=512, n_heads=8, n_kv_heads=4)
    _compare(model, tmp_path, ((2, "all"), (4, "few")), monkeypatch)


def test_three_stages_of_a_pipeline_do_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight heads cannot be held by three, so they are a pipeline; its stages have 1, 1 and 2 layers, or so."""
    model = tmp_path / "model"
    write_tiny_checkpoint(model, n_layers=4, hidden_size=512, intermediate_size=256, n_heads=8, n_kv_heads=4)
    _compare(model, tmp_path, ((3, "few"),), monkeypatch, is_exact=True)  # "all" is the same, and takes half a minute


def _compare(
    model: Path,
    folder: Path,
    processes: tuple[tuple[int, str], ...],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_exact: bool = False,
) -> None:
    result = folder / "result.json"
    alone = rank_program.loaded(model)
    rank_program.begin(alone, folder / "saved.qwq")
    rest = rank_program.go_on(alone, folder / "saved.qwq")
    few = {"resumed": rest, "draft model": rank_program.batch(load(model, verify=False))}
    expected = {"all": {**rank_program.work(alone), **few}, "few": few}
    write_tiny_checkpoint(folder / "draft", seed=1, n_layers=1)
    monkeypatch.setenv("PYTHONPATH", f"{Path(rank_program.__file__).parent}:{Path(__file__).parents[2]}")
    for n, what in processes:
        hosts = checked_hosts(parse_hosts(f"localhost*{n}"), [model], port=None)
        launch = Launch("rank_program", [str(model), str(folder), str(result), what], hosts, silent_s=100)
        assert launch.work() == 0
        assert [process.poll() for process in launch.processes] == [0] * n
        launch.close()
        assert json.loads(result.read_text()) == json.loads(json.dumps(expected[what]))
        assert _cache_of(folder / f"{n}.qwq").keys() == _cache_of(folder / "saved.qwq").keys()
        for name, array in _cache_of(folder / "saved.qwq").items():
            found = _cache_of(folder / f"{n}.qwq")[name]  # all heads, in order
            assert np.array_equal(found, array) if is_exact else np.allclose(found, array, atol=1e-4), name
        assert rank_program.go_on(alone, folder / f"{n}.qwq") == rest


def test_a_machine_says_what_it_lacks_before_a_weight_is_read(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model")
    asked = {
        "folders": [str(tmp_path / "gone"), str(model)],
        "identity": model_identity(model),
        "versions": versions(),
        "follow_links": False,
    }
    reply, folder = _planned(asked, None)
    assert folder == model and reply["limit_bytes"] > 0
    other = write_tiny_checkpoint(tmp_path / "other", n_layers=1)
    for change, words in (
        ({"versions": {**versions(), "mlx": "0.1"}}, "other versions: .*mlx"),
        ({"folders": [str(tmp_path / "gone")]}, "there is no model folder .*gone"),
        ({"folders": [str(other)]}, "holds another model than rank 0"),
        ({"folders": [str(tmp_path)]}, "config.json"),
    ):
        reply, folder = _planned({**asked, **change}, None)
        assert folder is None and re.search(words, reply["error"]), reply
        assert "limit_bytes" not in reply
    assert _planned(asked, other)[1] is None  # the caller's own folder counts alone


def test_a_link_carries_messages_and_says_when_the_other_end_is_silent_or_gone() -> None:
    ends = socket.socketpair(socket.AF_UNIX)
    first, second = (_Quiet(each) for each in ends)
    links = [Link(first, 1), Link(second, 0)]  # type: ignore[arg-type]
    links[0].send({"task": "pass", "ids": [[7]]})
    assert links[1].receive() == {"task": "pass", "ids": [[7]]}
    with links[1]._sending:  # as a Ctrl-C in the midst of a message finds it
        links[1].ask_to_stop()
    for _ in range(400):
        links[1].send({"host": "b"})
        assert links[0].receive() == {"host": "b"}
        if links[0].is_asked_to_stop:
            break
        time.sleep(0.01)
    assert links[0].is_asked_to_stop
    leader = Leader(None, links[:1])
    assert leader.take_stop() and not leader.take_stop()
    links[1].close()
    with pytest.raises(RankError, match="Process 1 is gone"):
        links[0].receive()
    with pytest.raises(RankError, match="Process 1 is gone"):
        for _ in range(100):
            leader.tell("end")
    links[0].close()


class _Quiet:
    """A socket of this machine, which knows no delays to turn off."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def setsockopt(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_ranks_of_one_machine_have_its_memory_together(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", n_layers=1)

    class Answering:
        def __init__(self, machine: str) -> None:
            self.peer, self._machine = 1, machine

        def send(self, message: dict[str, Any]) -> None:
            self._reply, _ = _planned(message, None)

        def receive(self) -> dict[str, Any]:
            return {**self._reply, "machine": self._machine, "limit_bytes": 30}

    links: list[Any] = [Answering(machine) for machine in (machine_name(), "another", machine_name())]
    limits = limits_of_ranks(Leader(None, links), model, 33, follow_links=False)
    assert limits == [11, 10, 30, 10]
    assert limits_of_ranks(Leader(None, links), model, None, follow_links=False) == [None] * 4


def test_a_draft_model_is_planned_in_process_0_though_another_one_has_less_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, split = pocket_checkpoint(), Split("tensor", (8, 8))
    limits = [  # rank 1 has the least room, but not by as much as a draft model takes in rank 0
        plan_memory(model, Workload(context=64, split=split, rank=rank), backend=backend_name()).peak_bytes
        + RESERVE_BYTES
        + (2 - rank) * 10_000
        for rank in range(2)
    ]
    plan = _planned_by_two(monkeypatch, model, Limits(context=64), limits)
    assert (plan.split, plan.plan.workload.rank) == (split, 1)
    assert plan.limits == limits and plan.peak_bytes[0] > plan.peak_bytes[1] == plan.plan.peak_bytes
    with pytest.raises(FitError):
        _planned_by_two(monkeypatch, model, Limits(context=64), limits, draft=str(model))


def test_the_process_that_binds_with_a_cache_that_is_quantized_to_fit_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain cache binds a Mac of 24 GiB, which has most layers; a quantized one that of 8 GiB, by its buffers."""
    shape, limits = shape_of_facts(QWQ_32B_PREVIEW), [metal_limit_bytes(gib << 30) for gib in (8, 24)]
    files = SimpleNamespace(config=shape.config, packed=shape.packed, path=Path("qwq"))
    monkeypatch.setattr(load_plan, "open_model_folder", lambda *_, **__: files)
    monkeypatch.setattr(load_plan, "backend_name", lambda: "metal")
    plan = _planned_by_two(monkeypatch, pocket_checkpoint(), Limits(kv_bits="auto", prefill_step=512), limits)
    assert (plan.split, plan.plan.workload.rank) == (Split("pipeline", (14, 50)), 0)
    assert plan.plan.limit_bytes == limits[0]


def test_a_follower_s_memory_is_free_of_the_model_before_when_it_says_how_much_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX keeps the buffers of what is freed, and the system counts them as taken."""
    tasks, kept = iter(["load", "plan", "end"]), list[int]()

    def loaded(*_: Any) -> Any:
        weights = mx.ones((4 << 20,))
        mx.eval(weights)
        return SimpleNamespace(weights=weights)

    def planned(*_: Any) -> tuple[dict[str, Any], None]:
        kept.append(mx.get_cache_memory())
        return {}, None

    monkeypatch.setattr(following, "_told", loaded)
    monkeypatch.setattr(following, "_planned", planned)
    link: Any = SimpleNamespace(receive=lambda: {"task": next(tasks)}, send=lambda _: None)
    following._follow(link, None, None)
    assert len(kept) == 1 and kept[0] < 1 << 20


def test_a_follower_wires_what_is_planned_for_it_until_the_next_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 and all who wait for a process wait for its pages, too."""
    wired: list[int] = []

    @contextmanager
    def recorded(n_bytes: int) -> Iterator[None]:
        wired.append(n_bytes)
        yield
        wired.remove(n_bytes)

    settings = dict.fromkeys(("compute_type", "follow_links", "reproducible", "verify"))
    tasks = iter([{"task": "load", **settings, "split": {"kind": "tensor", "n_layers": [1, 1]}, "peak_bytes": [7, 9]}])
    monkeypatch.setattr(following, "wired", recorded)
    monkeypatch.setattr(following, "load_model", lambda *_, **__: SimpleNamespace(module=None))
    monkeypatch.setattr(following, "_planned", lambda *_: ({}, None))
    held: list[list[int]] = []
    link: Any = SimpleNamespace(
        receive=lambda: next(tasks, {"task": "plan" if len(held) == 1 else "end"}), send=lambda _: held.append([*wired])
    )
    loaded = following._loaded
    monkeypatch.setattr(following, "_loaded", lambda group, _, message: loaded(group, pocket_checkpoint(), message))
    following._follow(link, SimpleNamespace(rank=lambda: 1), None)
    assert held == [[9], []]


def test_all_compute_in_the_type_of_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac and a Linux machine without a GPU would each take their own, and sum or send bytes of two types."""
    settings: list[Any] = []

    def began(*_: Any, **more: Any) -> None:
        settings.append(more["compute_type"])
        raise RankError("far enough")

    model = pocket_checkpoint()
    plan = _planned_by_two(monkeypatch, model, Limits(context=64), [1 << 40, 1 << 40])
    monkeypatch.setattr(load_plan, "begin_loading", began)
    for asked in (None, "bfloat16"):
        with pytest.raises(RankError, match="far enough"):
            load_plan.load_planned(
                plan,
                compute_type=asked,  # type: ignore[arg-type]
                chat_template=None,
                follow_links=False,
                reproducible=False,
                verify=False,
                progress=None,
            )
    assert settings == [default_compute_type(), "bfloat16"]


def _planned_by_two(
    monkeypatch: pytest.MonkeyPatch, model: Path, limits: Limits, of_ranks: list[int], draft: str | None = None
) -> load_plan.LoadPlan:
    monkeypatch.setattr(load_plan, "lead", lambda group: group)
    monkeypatch.setattr(load_plan, "limits_of_ranks", lambda *_, **__: of_ranks)
    return load_plan.plan_load(
        model,
        limits,
        compute_type=None,
        force=False,
        follow_links=False,
        reproducible=False,
        draft=draft,
        draft_length=None,
        group=SimpleNamespace(size=lambda: 2),
        split=None,
    )
