"""YaRN: transformers' frequencies, attention factor and logits; the context and the memory plan follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert.job import convert_checkpoint
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.errors import OptionError
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.load import load_model
from qwq_mlx.model.memory.plan import Workload, plan_memory
from qwq_mlx.options import Limits, Sampling

pytestmark = pytest.mark.tiny
# The first is what Qwen2.5's cards advise, on 128 trained positions.
QWEN = {"factor": 4.0, "original_max_position_embeddings": 128, "type": "yarn"}
OTHER = {"factor": 2.5, "original_max_position_embeddings": 100, "rope_type": "yarn", "beta_fast": 8, "beta_slow": 2}


@pytest.fixture
def stretched(tmp_path: Path, known_checkpoint: Path) -> Path:
    return edit(shutil.copytree(known_checkpoint, tmp_path / "model"), rope_scaling=QWEN, max_position_embeddings=128)


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("scaling", [QWEN, OTHER])
def test_frequencies_and_attention_factor_are_those_of_transformers(stretched: Path, scaling: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    edit(stretched, rope_scaling=scaling)
    theirs = transformers.AutoConfig.from_pretrained(stretched)
    inverse, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    rope = load_model(stretched).module.layers[0].self_attn.rope
    np.testing.assert_allclose(1 / np.array(rope._freqs), inverse.numpy(), rtol=1e-6)
    assert rope.mscale == pytest.approx(attention_factor, rel=1e-6)


def test_logits_beyond_the_trained_positions_are_those_of_transformers(stretched: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ids = [(7 * place) % 256 for place in range(300)]
    ours = np.array(load_model(stretched).module(mx.array([ids])).astype(mx.float32))[0]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(stretched, dtype=torch.float32)
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
    edit(stretched, rope_scaling=None)
    plain = np.array(load_model(stretched).module(mx.array([ids])).astype(mx.float32))[0]
    assert np.abs(ours - plain).max() / np.abs(theirs).max() > 1e-3, "the test would not see YaRN"


def test_context_and_plan_grow_by_the_factor_also_with_a_quantized_cache(stretched: Path, tmp_path: Path) -> None:
    convert_checkpoint(stretched, tmp_path / "out", quality=False)
    plain = plan_memory(edit(shutil.copytree(stretched, tmp_path / "plain"), rope_scaling=None))
    plan = plan_memory(tmp_path / "out")
    assert (plan.context, plain.context) == (512, 128)
    assert plan.kv_bytes == 2 * plain.kv_bytes  # of 512 and 256 positions: room is made by 256
    with pytest.raises(OptionError, match="context is 513, expected at most 512"):
        plan_memory(tmp_path / "out", Workload(context=513))
    reasoner, question = load(tmp_path / "out", force=True), "a " * 100
    trace = reasoner.generate(question, sampling=Sampling(temperature=0), limits=Limits(max_tokens=60))
    assert len(trace.prompt_ids) + len(trace.ids) > 128 and trace.finish_reason in ("length", "stop", "loop")


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_beside_a_quantized_cache_logits_are_those_of_the_full_pass_up_to_its_rounding(
    bits: int, bound: float, tmp_path: Path
) -> None:
    """Keys are rotated and stretched before they are quantized: in chunks, one by one, beyond the trained positions."""
    folder = write_tiny_checkpoint(tmp_path / "wide", n_heads=2, n_kv_heads=1)  # heads of 64
    edit(folder, rope_scaling=QWEN, max_position_embeddings=128)
    ids = [(7 * place) % 256 for place in range(300)]
    module = load_model(folder).module
    expected = np.array(module(mx.array([ids])))[0, -20:]
    cache = new_cache(module, bits)
    for start in range(0, 280, 70):
        module(mx.array([ids[start : start + 70]]), cache=cache)
    found = np.array([np.array(module(mx.array([[each]]), cache=cache))[0, 0] for each in ids[280:]])
    error = np.abs(found - expected).max() / np.abs(expected).max()
    edit(folder, rope_scaling=None)
    plain = np.array(load_model(folder).module(mx.array([ids])))[0, -20:]
    assert error < bound
    if bits == 8:
        assert np.abs(plain - expected).max() / np.abs(expected).max() > 2 * error, "the test would not see YaRN"
