"""The streamed numbers against a direct computation from whole-model logits in numpy, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import OptionError
from qwq_mlx.model import layers
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quality.divergence import Divergence
from qwq_mlx.quality.measure import measure
from qwq_mlx.quality.result import summarise
from qwq_mlx.quality.text import QualityText, Window

pytestmark = pytest.mark.tiny
RANDOM = np.random.default_rng(5)
TEXT = QualityText(
    name="random",
    sha256="0" * 64,
    windows=(
        Window(ids=tuple(RANDOM.integers(0, 298, 40).tolist()), first=1),
        Window(ids=tuple(RANDOM.integers(0, 298, 25).tolist()), first=9),
    ),
    n_left_out=0,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("measure") / "packed"
    convert_checkpoint(tiny_checkpoint, folder)
    return folder


def log_softmax(folder: Path, ids: tuple[int, ...]) -> np.ndarray:
    module = load_model(folder, compute_type="float32").module
    logits = np.array(module(mx.array([ids])))[0].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def test_every_number_is_what_numpy_finds_from_the_whole_models(
    tiny_checkpoint: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "HEAD_BLOCK_BYTES", 70 * 4 * 128)  # five blocks of ids, the last one shorter
    kl, agree, surprise, reference_surprise, worst = [], [], [], [], []
    for number, window in enumerate(TEXT.windows):
        a, b = log_softmax(tiny_checkpoint, window.ids), log_softmax(packed, window.ids)
        for position in range(window.first, len(window.ids)):
            p, q, next_id = a[position - 1], b[position - 1], window.ids[position]
            kl.append(float((np.exp(p) * (p - q)).sum()))
            agree.append(p.argmax() == q.argmax())
            reference_surprise.append(-p[next_id])
            surprise.append(-q[next_id])
            worst.append((kl[-1], number, position, p.argmax(), float(np.exp(p.max())), q.argmax()))
    files = open_model_folder(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint, vocab_size=320)
    found = summarise(measure(files, [open_model_folder(packed)], TEXT)[0], TEXT, tokenizer)
    assert (found.n_positions, found.n_tokens) == (65, 39 + 16) == (65, len(kl))
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert found.kl > 1e-3  # the rounding to 4 bits is seen
    assert found.top1_agreement == pytest.approx(np.mean(agree), abs=1e-6)
    assert found.perplexity == pytest.approx(np.exp(np.mean(surprise)), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(np.mean(reference_surprise)), rel=1e-4)
    worst.sort(reverse=True)
    for ours, (value, number, position, top, probability, other) in zip(found.worst, worst, strict=False):
        assert (ours.window, ours.position) == (number, position)
        assert ours.kl == pytest.approx(value, rel=1e-4)
        ids = TEXT.windows[number].ids
        assert ours.next == tokenizer.hf.decode([ids[position]])
        assert ours.context == tokenizer.hf.decode(list(ids[max(0, position - 16) : position]))
        assert (ours.reference, ours.model) == (tokenizer.hf.decode([top]), tokenizer.hf.decode([other]))
        assert ours.reference_p == pytest.approx(probability, rel=1e-4)


def hidden_states(folder: Path, ids: tuple[int, ...]) -> list[np.ndarray]:
    module = load_model(folder, compute_type="float32").module.model
    states = [module.embed_tokens(mx.array([ids]))]
    for layer in module.layers:
        states.append(layer(states[-1], "causal", None))
    return [np.array(each)[0].astype(np.float64) for each in states]


def test_drift_is_the_mean_relative_error_of_hidden_states(tiny_checkpoint: Path, packed: Path) -> None:
    found = measure(open_model_folder(tiny_checkpoint), [open_model_folder(packed)], TEXT)[0].drift
    errors: list[list[np.ndarray]] = [[], [], []]
    for window in TEXT.windows:
        pairs = zip(hidden_states(tiny_checkpoint, window.ids), hidden_states(packed, window.ids), strict=True)
        for place, (theirs, ours) in enumerate(pairs):
            errors[place].append(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1))
    np.testing.assert_allclose(found, [np.concatenate(each).mean() for each in errors], rtol=1e-4)


def test_a_model_against_itself_has_lost_nothing_and_several_are_measured_in_one_pass(
    tiny_checkpoint: Path, packed: Path
) -> None:
    files, conversion = open_model_folder(tiny_checkpoint), open_model_folder(packed)
    tokenizer = load_tokenizer(tiny_checkpoint, vocab_size=320)
    alone = measure(files, [conversion], TEXT)[0]
    seen: list[tuple[int, int]] = []
    both = measure(files, [files, conversion], TEXT, progress=lambda *at: seen.append(at))
    itself, again = (summarise(each, TEXT, tokenizer) for each in both)
    assert (itself.kl, itself.kl_max, itself.top1_agreement, set(itself.drift)) == (0.0, 0.0, 1.0, {0.0})
    assert itself.perplexity == itself.reference_perplexity == again.reference_perplexity
    assert again == summarise(alone, TEXT, tokenizer)
    done, totals = [at[0] for at in seen], {at[1] for at in seen}
    assert totals == {2 * files.checkpoint.tensor_bytes + conversion.checkpoint.tensor_bytes}
    assert done == sorted(done)
    assert done[-1] > 0.7 * totals.pop()


def test_a_model_of_another_shape_is_refused_with_each_difference(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", n_layers=3, vocab_size=330)
    text = r"num_hidden_layers is 3, the reference has 2; vocab_size is 330, the reference has 320\. Give conversions"
    with pytest.raises(OptionError, match=rf"other: is another model than .*{text}"):
        measure(open_model_folder(tiny_checkpoint), [open_model_folder(other)], TEXT)


def peak_bytes(checkpoint: Path, text: QualityText) -> int:
    files = open_model_folder(checkpoint)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(files, [files], text)
    return int(mx.get_peak_memory()) - before


def test_neither_layers_nor_vocabulary_nor_their_product_with_the_text_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "HEAD_BLOCK_BYTES", 128 << 10)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "n_shards": 1, "vocab_size": 8192}
    small = write_tiny_checkpoint(tmp_path / "small", n_layers=1, **sizes)
    deep = write_tiny_checkpoint(tmp_path / "deep", n_layers=4, **sizes)
    layer_bytes, logits_bytes = 4 * (6 * 256 * 128 + 3 * 256 * 512), 4 * 64 * 8192
    text = QualityText(name="", sha256="", windows=(Window(ids=tuple(range(64)), first=1),), n_left_out=0)
    one, four = peak_bytes(small, text), peak_bytes(deep, text)
    assert one < layer_bytes + 0.6 * logits_bytes
    assert four < one + 0.2 * layer_bytes


def test_blocks_of_ids_in_any_cut_give_the_same_sums() -> None:
    a = 8 * RANDOM.standard_normal((6, 50)).astype(np.float32)
    b = a + RANDOM.standard_normal((6, 50)).astype(np.float32)
    next_ids = [0, 49, 10, 9, 25, 3]

    def found(cuts: list[int]) -> Any:
        divergence = Divergence(next_ids)
        for first, end in itertools.pairwise(cuts):
            divergence.add(first, mx.array(a[:, first:end]), mx.array(b[:, first:end]))
        return divergence.positions()

    whole, cut = found([0, 50]), found([0, 10, 11, 30, 50])
    for name in ("kl", "reference_logprob", "logprob", "reference_top_p", "top_p"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole.top, b.argmax(1))
    np.testing.assert_array_equal(cut.top, b.argmax(1))
    np.testing.assert_array_equal(cut.reference_top, a.argmax(1))
