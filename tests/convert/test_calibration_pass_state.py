"""A calibration pass that was stopped goes on behind the last layer that was kept, and ends with the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from hub_server import HubServer, Repository
from safetensors.numpy import load_file, save_file

from qwq_mlx.convert import ConvertProgress, convert_checkpoint
from qwq_mlx.convert.calibration import pass_state
from qwq_mlx.convert.calibration.pass_state import (
    PassShape,
    PassState,
    PassStateWriter,
    pass_state_path,
    read_pass_state,
)
from qwq_mlx.files.header import place_tensors, read_header
from qwq_mlx.model.layers import LayerStream

pytestmark = pytest.mark.tiny
RUN = {"file": "text.txt", "type": "float32"}
SHAPE = PassShape(n_layers=6, lengths=(3, 1, 12), width=8, is_toward_float=True)
N_LAYERS = 6


def some() -> PassState:
    random = np.random.default_rng(3)
    return PassState(
        n_layers=2,
        hidden=[random.standard_normal((n, SHAPE.width)).astype(np.float32) for n in SHAPE.lengths],
        float_hidden=[mx.array(random.standard_normal((n, SHAPE.width))).astype(mx.bfloat16) for n in SHAPE.lengths],
    )


def test_what_is_kept_comes_back_bit_for_bit_and_only_for_its_own_run(tmp_path: Path) -> None:
    path, given = pass_state_path(tmp_path), some()
    assert read_pass_state(path, RUN, SHAPE) is None
    PassStateWriter(path, RUN).keep(given)
    found = read_pass_state(path, RUN, SHAPE)
    assert found is not None and found.n_layers == 2
    for ours, theirs in zip(found.hidden, given.hidden, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and np.array_equal(ours, theirs)
    for ours, theirs in zip(found.float_hidden, given.float_hidden, strict=True):
        assert ours.dtype == np.float32 and np.array_equal(ours, np.array(theirs.astype(mx.float32)))
    assert read_pass_state(path, {**RUN, "type": "bfloat16"}, SHAPE) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert read_pass_state(path, RUN, SHAPE) is None


def test_a_text_of_more_lines_than_a_file_may_have_arrays_is_kept_too(tmp_path: Path) -> None:
    path, lengths = pass_state_path(tmp_path), [1, 2] * 20_001
    rows = np.arange(3 * 20_001 * 2, dtype=np.float32).reshape(-1, 2)
    hidden = np.split(rows, np.cumsum(lengths)[:-1])
    PassStateWriter(path, RUN).keep(PassState(n_layers=1, hidden=hidden, float_hidden=[]))
    found = read_pass_state(path, RUN, PassShape(n_layers=2, lengths=lengths, width=2, is_toward_float=False))
    assert found is not None and found.float_hidden == []
    assert all(np.array_equal(*each) for each in zip(found.hidden, hidden, strict=True))


def test_a_pass_is_kept_once_a_minute_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pass_state.time, "monotonic", lambda: now[0])
    keeper = PassStateWriter(tmp_path / "begun.safetensors", RUN)
    due = []
    for now[0] in (101.0, 159.0, 160.0, 170.0, 219.0, 221.0):
        due.append(keeper.is_due())
        if due[-1]:
            keeper.keep(some())
    assert due == [False, False, True, False, False, True]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("wait, is the answer 479? let me think again. " * 20, encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source", n_layers=N_LAYERS, n_shards=6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that passes read, as they are read; every layer is kept, without waiting a minute."""
    found: list[int] = []

    def seen(read: Callable[[LayerStream, int], Any]) -> Callable[[LayerStream, int], Any]:
        def read_it(self: LayerStream, index: int) -> Any:
            found.append(index)
            return read(self, index)

        return read_it

    for name in ("layer", "twins"):
        monkeypatch.setattr(LayerStream, name, seen(getattr(LayerStream, name)))
    monkeypatch.setattr(pass_state, "_EVERY_S", 0.0)
    return found


def stop_at(layer: int, read: list[int]) -> Any:
    def stop(progress: ConvertProgress) -> None:
        if progress.phase == "calibrate" and f"layers.{layer}." in progress.what:
            read.clear()
            raise KeyboardInterrupt

    return stop


def same_files(one: Path, other: Path) -> bool:
    names = [path.name for path in one.glob("*.safetensors")]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_stopped_pass_goes_on_behind_the_layer_that_was_kept(
    source: Path, text: Path, tmp_path: Path, read: list[int]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    convert_checkpoint(source, whole, calibrate=text, quality=False)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, output, calibrate=text, quality=False, progress=stop_at(4, read))
    kept = pass_state_path(tmp_path / "out.partial" / "calibration")
    left = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    left.write_bytes(b"torn")
    convert_checkpoint(source, output, calibrate=text, quality=False, progress=lambda _: read.append(-left.exists()))
    assert [each for each in read if each > 0] == [4, 5] and -1 not in read
    assert same_files(output, whole) and not (tmp_path / "out.partial").exists()


def test_a_pass_of_another_text_or_version_begins_anew(
    source: Path, text: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", calibrate=text, quality=False, progress=stop_at(3, read))
    monkeypatch.setattr(mx, "__version__", "0.0.1")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", calibrate=text, quality=False, progress=stop_at(5, seen := []))
    assert read == list(range(N_LAYERS)) and not seen


def test_a_pass_of_a_source_that_was_trained_on_since_begins_anew(text: Path, tmp_path: Path, read: list[int]) -> None:
    source, other = (write_tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (("source", 0), ("other", 1)))

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", calibrate=text, quality=False, progress=stop_at(1, read))
    for path in other.glob("*.safetensors"):  # of the same names and sizes
        (source / path.name).write_bytes(path.read_bytes())
    read.clear()
    convert_checkpoint(source, tmp_path / "out", calibrate=text, quality=False)
    assert read == [0, 1]
    convert_checkpoint(other, tmp_path / "whole", calibrate=text, quality=False)
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_from_the_hub_only_the_shards_of_the_layers_to_come_are_fetched_again(
    source: Path, text: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetched: list[int] = []

    def look(progress: ConvertProgress) -> None:
        if progress.phase == "calibrate":
            fetched.append(progress.fetched_bytes or 0)

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.repositories["a/b"] = Repository()
        server.repositories["a/b"].push({path.name: path.read_bytes() for path in source.iterdir()})
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint("a/b", tmp_path / "out", calibrate=text, progress=stop_at(4, read))
        convert_checkpoint("a/b", tmp_path / "out", calibrate=text, progress=look)
    assert read == [4, 5]
    assert 0 < max(fetched) < 0.7 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    convert_checkpoint(source, tmp_path / "local", calibrate=text, quality=False)
    assert same_files(tmp_path / "out", tmp_path / "local")


Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize(
    "change",
    [
        lambda held, metadata: held.pop("packed"),
        lambda held, metadata: held.pop("float"),
        lambda held, metadata: held.update({"other": held["packed"]}),
        lambda held, metadata: held.update({"packed": held["packed"][:, :-1].copy()}),
        lambda held, metadata: held.update({"float": held["float"][:-1].copy()}),
        lambda held, metadata: held.update({"float": held["float"].astype(np.float16)}),
        lambda held, metadata: metadata.pop("n_layers"),
        lambda held, metadata: metadata.update(n_layers="-1"),
        lambda held, metadata: metadata.update(n_layers="7"),
        lambda held, metadata: metadata.update(n_layers="four"),
    ],
)
def test_a_file_that_does_not_hold_what_the_pass_keeps_is_as_good_as_none(
    tmp_path: Path, change: Callable[[Arrays, dict[str, str]], Any]
) -> None:
    path = pass_state_path(tmp_path)
    PassStateWriter(path, RUN).keep(some())
    held, metadata = load_file(path), dict(read_header(path).metadata)
    change(held, metadata)
    save_file(held, path, metadata)
    assert read_pass_state(path, RUN, SHAPE) is None


@pytest.mark.parametrize("name", ["layer-00001", "output"])
def test_a_pass_whose_results_are_not_all_there_begins_anew(
    text: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("qwq_mlx.convert.calibration.text.MIN_IDS_TOWARD_FLOAT", 512)
    source, whole, output = write_tiny_checkpoint(tmp_path / "source"), tmp_path / "whole", tmp_path / "out"
    convert_checkpoint(source, whole, calibrate=text, quality=False)

    def stop(progress: ConvertProgress) -> None:
        if progress.phase == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, output, calibrate=text, quality=False, progress=stop)
    path = tmp_path / "out.partial" / "calibration" / f"{name}.safetensors"
    header, data = read_header(path), path.read_bytes()
    left = [each for each in header.tensors.values() if "q_proj" not in each.name and "drift" not in each.name]
    assert len(left) < len(header.tensors)
    head, _ = place_tensors([(each.name, each.dtype, each.shape) for each in left], header.metadata)
    path.write_bytes(head + b"".join(data[each.start : each.end] for each in left))
    read.clear()
    convert_checkpoint(source, output, calibrate=text, quality=False)
    assert read == [0, 1] and same_files(output, whole)
