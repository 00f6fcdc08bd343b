"""Real models of 0.5 and 1.5 billion parameters, as `make real` leaves them: what a small model cannot show.

QWQ_MLX_REAL names the folder that holds 0.5b/checkpoint, 0.5b/4bit and so on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwq_mlx
from qwq_mlx.doctor.recorded import NEAR_TIE, differences
from qwq_mlx.evaluate.__main__ import main as evaluate
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quality.measure import measure
from qwq_mlx.quality.text import bundled_text, read_text

REAL = os.environ.get("QWQ_MLX_REAL")
HERE = Path(__file__).parent
MODELS = ("0.5b", "1.5b")

pytestmark = pytest.mark.skipif(REAL is None, reason="needs real models: make real")


def folder(model: str, form: str) -> Path:
    assert REAL is not None
    return Path(REAL) / model / form


@pytest.mark.parametrize("model", MODELS)
def test_greedy_ids_are_those_that_were_recorded(model: str) -> None:
    recorded = json.loads((HERE / "recorded.json").read_text())[model]
    loaded = load_model(folder(model, "4bit"))
    seen = differences(loaded, recorded["prompt_ids"], recorded["ids"], recorded["margins"])
    limit = NEAR_TIE[loaded.compute_type]
    assert [each for each in seen if max(each.recorded_margin, each.margin) > limit] == []
    assert len(seen) <= 0.1 * len(recorded["ids"])


@pytest.mark.parametrize("model", MODELS)
def test_memory_is_as_planned(model: str, repository: Path) -> None:
    script = [sys.executable, str(repository / "scripts" / "measure_memory.py"), "--model", str(folder(model, "4bit"))]
    options = ["--contexts", "1024", "--kv-bits", "0", "8", "--prefill-steps", "256", "--tokens", "2", "--no-rates"]
    done = subprocess.run([*script, *options, "--budget", "900"], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["settings"]) == 2
    low, high = result["planned/measured"]
    assert low >= 0.98 and high <= 1.02


def test_what_a_conversion_lost_is_what_transformers_finds_on_its_unpacked_weights() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, packed = folder("0.5b", "checkpoint"), folder("0.5b", "4bit")
    files = open_model_folder(source)
    tokenizer = load_tokenizer(source, vocab_size=files.config.vocab_size)
    text = read_text(bundled_text(files.config), tokenizer, files.config, n_positions=400)
    [ours] = measure(files, [open_model_folder(packed)], text)

    model = transformers.Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)

    def log_probabilities() -> list[Any]:
        with torch.no_grad():
            logits = [model(torch.tensor([window.ids])).logits[0] for window in text.windows]
        return [
            torch.log_softmax(each[window.first - 1 : -1].double(), dim=-1)
            for each, window in zip(logits, text.windows, strict=True)
        ]

    before = log_probabilities()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in unpacked(packed).items()})
    after = log_probabilities()
    for window, reference, packed_one, measured in zip(text.windows, before, after, ours.windows, strict=True):
        ids = torch.tensor(window.ids[window.first :])[:, None]
        kl = (reference.exp() * (reference - packed_one)).sum(-1).numpy()
        # both in float32: log-probabilities are equal to some 1e-4, and so is what they differ by
        np.testing.assert_allclose(measured.kl, kl, atol=3e-4)
        np.testing.assert_allclose(measured.kl.mean(), kl.mean(), rtol=2e-3)
        np.testing.assert_allclose(measured.logprob, packed_one.gather(1, ids)[:, 0].numpy(), atol=1e-3)
    assert np.concatenate([each.kl for each in ours.windows]).mean() > 0.005


def unpacked(packed: Path) -> dict[str, np.ndarray]:
    """Every tensor of a 4-bit conversion as float32, by mx.dequantize."""
    import mlx.core as mx

    arrays = {}
    for shard in open_checkpoint(packed).shards:
        arrays |= mx.load(str(shard.path))
    result = {}
    for name, array in arrays.items():
        path, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if kind == "weight" and f"{path}.scales" in arrays:  # in their own type the weights would be rounded to it
            scales, biases = (arrays[f"{path}.{each}"].astype(mx.float32) for each in ("scales", "biases"))
            array = mx.dequantize(array, scales, biases, 64, 4)
        result[name] = np.array(array.astype(mx.float32))
    return result


def test_problems_are_solved_as_often_as_by_the_unpacked_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The 1.5B in bfloat16 solved 121 of 200 on an H200 at its own temperature; a broken conversion solves none."""
    arguments = ["--task", str(HERE / "gsm8k_20.jsonl"), "--model", str(folder("1.5b", "4bit"))]
    options = ["--output", str(tmp_path / "run"), "--temp", "0", "--max-tokens", "400", "--width", "20"]
    assert evaluate([*arguments, *options, "--json", "--quiet"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert model["n_problems"] == 20 and model["accuracy"] >= 0.4
    assert "loop" not in model["endings"]


def test_a_loop_that_greedy_decoding_falls_into_is_ended() -> None:
    """Behind some thirty animals the 0.5B writes the same one or two on every further line (two, by today's fit)."""
    reasoner = qwq_mlx.load(folder("0.5b", "4bit"))
    trace = reasoner.generate(
        "List 100 different animals, one a line.",
        sampling=qwq_mlx.Sampling(temperature=0),
        limits=qwq_mlx.Limits(max_tokens=600),
        thinking=qwq_mlx.Thinking(on_loop="stop"),
    )
    lines = trace.text.splitlines()
    assert trace.finish_reason == "loop"
    assert len({line.split(". ")[-1] for line in lines[-5:]}) <= 2, "the last lines repeat but for their numbers"
