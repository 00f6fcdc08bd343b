"""Several processes hold one model over MLX's ring on this machine, and write what one process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_program
from checkpoints import write_tiny_checkpoint

from qwq_mlx.cli.host_check import checked_hosts
from qwq_mlx.cli.hosts import parse_hosts
from qwq_mlx.cli.launch import Launch
from qwq_mlx.generate.checkpoint.file import read_checkpoint


def _cache_of(path: Path) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in read_checkpoint(path)[1].items()}


def test_two_and_four_processes_do_what_one_does_and_go_on_with_each_other_s_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, batches, drafts, budgets, an 8-bit cache, forks, votes, asking, stopping, saving and resuming."""
    model, result = tmp_path / "model", tmp_path / "result.json"
    write_tiny_checkpoint(model, n_layers=1, hidden_size=512, intermediate_size=512, n_heads=8, n_kv_heads=4)
    alone = rank_program.loaded(model)
    rank_program.begin(alone, tmp_path / "saved.qwq")
    rest = rank_program.go_on(alone, tmp_path / "saved.qwq")
    expected = {"all": {**rank_program.work(alone), "resumed": rest}, "few": {"resumed": rest}}
    monkeypatch.setenv("PYTHONPATH", f"{Path(rank_program.__file__).parent}:{Path(__file__).parents[2]}")
    for n, what in ((2, "all"), (4, "few")):
        hosts = checked_hosts(parse_hosts(f"localhost*{n}"), [model], port=None)
        launch = Launch("rank_program", [str(model), str(tmp_path), str(result), what], hosts, silent_s=100)
        assert launch.work() == 0
        assert [process.poll() for process in launch.processes] == [0] * n
        launch.close()
        assert json.loads(result.read_text()) == json.loads(json.dumps(expected[what]))
        assert _cache_of(tmp_path / f"{n}.qwq").keys() == _cache_of(tmp_path / "saved.qwq").keys()
        for name, array in _cache_of(tmp_path / "saved.qwq").items():
            assert np.allclose(_cache_of(tmp_path / f"{n}.qwq")[name], array, atol=1e-4), name  # all heads, in order
        assert rank_program.go_on(alone, tmp_path / f"{n}.qwq") == rest
