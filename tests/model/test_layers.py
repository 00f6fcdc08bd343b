"""Layer by layer: the whole model's logits, inputs as numpy computes them, and memory that depth does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.model import blas
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.layers import LayerStream
from qwq_mlx.model.load import load_model
from qwq_mlx.pocket import FOLDER as POCKET

pytestmark = pytest.mark.tiny
TEXTS = [[5, 260, 17, 260, 99, 1, 1, 42], [7], [3, 2, 1, 0, 299, 8]]


def whole_logits(folder: Path, texts: list[list[int]], compute_type: Any = None) -> list[np.ndarray]:
    module = load_model(folder, compute_type=compute_type).module
    return [np.array(module(mx.array([text])).astype(mx.float32))[0] for text in texts]


def run(stream: LayerStream, texts: list[list[int]]) -> list[Any]:
    """All texts through all layers; their normed hidden states."""
    hidden = [stream.embed(text) for text in texts]
    for index in range(stream.config.num_hidden_layers):
        layer = stream.layer(index)
        hidden = [layer(each) for each in hidden]
        del layer  # before the next is read
    head = stream.head()
    return [head.norm(each) for each in hidden]


def streamed_logits(stream: LayerStream, texts: list[list[int]], n_ids: int | None = None) -> list[np.ndarray]:
    normed = run(stream, texts)
    parts: list[list[np.ndarray]] = [[] for _ in texts]
    for block in stream.head().blocks(n_ids):
        for part, each in zip(parts, normed, strict=True):
            part.append(np.array(block.logits(each).astype(mx.float32)))
    return [np.concatenate(part, axis=1) for part in parts]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "packed"
    convert_checkpoint(tiny_checkpoint, folder)
    return folder


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("compute_type", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("n_ids", [None, 7])
def test_streamed_logits_are_the_whole_models(
    tiny_checkpoint: Path, packed: Path, is_packed: bool, compute_type: Any, bound: float, n_ids: int | None
) -> None:
    folder = packed if is_packed else tiny_checkpoint
    stream = LayerStream(open_model_folder(folder), compute_type=compute_type)
    whole = whole_logits(folder, TEXTS, compute_type)
    for ours, theirs in zip(streamed_logits(stream, TEXTS, n_ids), whole, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=bound, atol=bound * float(np.abs(theirs).max()))


def test_attention_by_blas_in_pieces_is_the_whole_models(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "_QUERIES", 3)
    stream = LayerStream(open_model_folder(tiny_checkpoint), compute_type="float32")
    whole = whole_logits(tiny_checkpoint, TEXTS, "float32")
    for ours, theirs in zip(streamed_logits(stream, TEXTS), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_tied_embeddings_and_every_float_type_stream(tmp_path: Path, dtype: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, tie=True, dtype=dtype, seed=2)
    stream = LayerStream(open_model_folder(folder), compute_type="float32")
    assert stream.head().path == "model.embed_tokens"
    for ours, theirs in zip(streamed_logits(stream, TEXTS, 100), whole_logits(folder, TEXTS, "float32"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("unpack", [False, True])
def test_float_modes_stream_packed_and_unpacked(
    tmp_path: Path, tiny_checkpoint: Path, recipe: str, unpack: bool
) -> None:
    folder = tmp_path / recipe
    convert_checkpoint(tiny_checkpoint, folder, recipe=recipe, quality=False)
    stream = LayerStream(open_model_folder(folder), compute_type="float32", unpack=unpack)
    for ours, theirs in zip(streamed_logits(stream, TEXTS, 100), whole_logits(folder, TEXTS, "float32"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(np.abs(theirs).max()))


@pytest.mark.pocket
def test_the_pocket_streams_with_the_whole_models_logits() -> None:
    texts = [list(range(40, 80)), list(range(300, 560, 8))]
    stream = LayerStream(open_model_folder(POCKET))
    for ours, theirs in zip(streamed_logits(stream, texts, 200), whole_logits(POCKET, texts), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_every_part_is_fed_with_is_what_the_whole_models_parts_give(tiny_checkpoint: Path) -> None:
    stream = LayerStream(open_model_folder(tiny_checkpoint), compute_type="float32")
    layer, hidden = stream.layer(0), stream.embed(TEXTS[0])
    fed = {path: layer.fed(hidden, part) for part in layer.parts for path in part}
    matrices = {name.removesuffix(".weight") for name, (_, entry) in stream.files.checkpoint.tensors.items()
                if len(entry.shape) == 2 and ".layers.0." in name}  # fmt: skip
    assert set(fed) == matrices
    block = load_model(tiny_checkpoint, compute_type="float32").module
    embedded = block.model.embed_tokens(mx.array([TEXTS[0]]))
    first = block.model.layers[0]
    normed = first.input_layernorm(embedded)
    attended = embedded + first.self_attn(normed, "causal", None)
    x = first.post_attention_layernorm(attended)
    gated = mx.sigmoid(first.mlp.gate_proj(x)) * first.mlp.gate_proj(x) * first.mlp.up_proj(x)
    for name, inputs, residual in (
        ("self_attn.k_proj", normed, embedded),
        ("mlp.up_proj", x, attended),
        ("mlp.down_proj", gated, attended),
    ):
        ours, theirs = fed[f"model.layers.0.{name}"]
        np.testing.assert_allclose(ours, np.array(inputs)[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(theirs, np.array(residual)[0], rtol=1e-4, atol=1e-5)
    # what is fed to the output of attention, by what that makes of it
    ours, theirs = (np.array(each) for each in fed["model.layers.0.self_attn.o_proj"])
    added = ours @ np.array(first.self_attn.o_proj.weight).T
    np.testing.assert_allclose(theirs + added, np.array(attended)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
def test_nothing_behind_a_part_is_computed_and_a_layer_that_was_asked_goes_on_as_before(
    tiny_checkpoint: Path, compute_type: Any
) -> None:
    stream = LayerStream(open_model_folder(tiny_checkpoint), compute_type=compute_type)
    layer, hidden = stream.layer(0), stream.embed(TEXTS[0])
    before, fed = np.array(layer(hidden).astype(mx.float32)), {}
    for part in layer.parts:
        fed[part] = np.array(layer.fed(hidden, part)[0].astype(mx.float32))
    assert np.array_equal(np.array(layer(hidden).astype(mx.float32)), before)
    for part in layer.parts:  # NaN in a part is seen in what the later ones are fed with, and in nothing before
        for path in part:
            shape = stream.files.checkpoint.tensors[f"{path}.weight"][1].shape
            layer.replace(path, np.full(shape, np.nan, np.float32))
        for each in layer.parts:
            now = np.array(layer.fed(hidden, each)[0].astype(mx.float32))
            is_behind = layer.parts.index(each) > layer.parts.index(part)
            assert np.isnan(now).any() == is_behind or (not is_behind and np.isnan(fed[each]).any())
            fed[each] = now


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_a_layer_computes_with_the_weights_that_replaced_its_own_and_its_twin_with_its_own(
    tiny_checkpoint: Path, compute_type: Any, name: str
) -> None:
    stream = LayerStream(open_model_folder(tiny_checkpoint), compute_type=compute_type)
    (layer, twin), path = stream.twins(0), f"model.layers.0.{name}"
    hidden = stream.embed(TEXTS[0])
    shape = stream.files.checkpoint.tensors[f"{path}.weight"][1].shape
    before = np.array(layer(hidden).astype(mx.float32))
    layer.replace(path, np.zeros(shape, np.float32))
    zeros = np.array(layer(hidden).astype(mx.float32))
    assert np.abs(zeros - before).max() > 1e-3
    assert np.array_equal(np.array(twin(hidden).astype(mx.float32)), before)
    whole = load_model(tiny_checkpoint, compute_type=compute_type).module
    block = whole.model.layers[0]
    module = getattr(getattr(block, name.split(".")[0]), name.split(".")[1])
    module.weight = mx.zeros_like(module.weight)
    expected = np.array(block(hidden[None], "causal", None)[0].astype(mx.float32))
    np.testing.assert_allclose(zeros, expected, rtol=1e-2, atol=1e-2 if compute_type == "bfloat16" else 1e-5)


def peak_bytes(folder: Path) -> int:
    """The most that MLX holds while a model of two texts streams."""
    stream = LayerStream(open_model_folder(folder), compute_type="float32")
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run(stream, TEXTS)
    return int(mx.get_peak_memory()) - before


def test_peak_memory_is_one_layers_however_many_there_are(tmp_path: Path) -> None:
    def model(n_layers: int) -> Path:
        return write_tiny_checkpoint(
            tmp_path / str(n_layers), n_layers=n_layers, hidden_size=256, intermediate_size=512, n_shards=1
        )

    one, eight = peak_bytes(model(1)), peak_bytes(model(8))
    layer_bytes = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    assert layer_bytes < one < 1.5 * layer_bytes
    assert eight < one + 0.1 * layer_bytes


def test_twins_share_memory(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, n_layers=1, hidden_size=256, intermediate_size=512, n_shards=1)
    stream = LayerStream(open_model_folder(folder), compute_type="float32")
    mx.clear_cache()
    before = mx.get_active_memory()
    twins = stream.twins(0)
    layer_bytes = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    assert layer_bytes < mx.get_active_memory() - before < 1.1 * layer_bytes
    del twins


def test_only_the_rows_of_the_texts_are_read_of_the_embedding(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, vocab_size=40_000, n_shards=1)
    stream = LayerStream(open_model_folder(folder), compute_type="float32")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert stream.embed([39_999, 5, 5]).shape == (3, 128)
    assert mx.get_peak_memory() - before < 20_000


@pytest.mark.parametrize("ids", [[], [320], [-1, 4]])
def test_ids_beyond_the_vocabulary_are_refused(tiny_checkpoint: Path, ids: list[int]) -> None:
    stream = LayerStream(open_model_folder(tiny_checkpoint))
    with pytest.raises(OptionError, match=r"expected at least one, all from 0 to 319\. Encode the text"):
        stream.embed(ids)


def test_a_shard_that_goes_away_meanwhile_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, n_shards=1)
    stream = LayerStream(open_model_folder(folder))
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match=r"model-00001-of-00001\.safetensors: cannot be opened any more"):
        stream.layer(0)
