"""Every folder that mlx-lm's own converters write loads here, and gives mlx-lm's greedy ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint
from commands import ENVIRONMENT

from qwq_mlx.model.load import load_model
from qwq_mlx.model.upstream import import_mlx_lm

pytestmark = pytest.mark.tiny

MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
NAMES = (*MIXED, "mixed_4_6-g64", "mxfp4", "nvfp4", "mxfp8", "awq", "gptq", "dynamic_quant", "dwq", "fuse")
PROMPT = list(range(40, 60))
N_IDS = 12

# In a process of its own: mlx_lm changes limits and the environment. Its calibration text comes from the web, so
# random ids stand in for it; nothing else of its converters is replaced.
THEIRS = """
import json, sys, pathlib
import mlx.core as mx
mx.set_default_device(mx.cpu)
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
from mlx_lm.quant import awq, dwq, dynamic_quant, gptq
from mlx_lm import fuse
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model, save

source, folder, prompt, n_ids = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
mx.random.seed(1)
for module in (awq, gptq, dynamic_quant):
    module.load_data = lambda tokenizer, num_samples, sequence_length: mx.random.randint(0, 290, (4, 32))

def command(module, name, *arguments):
    sys.argv = [name, "--model", source, "--mlx-path", str(folder / name), *arguments]
    module.main()

for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
    convert(source, str(folder / name), quantize=True, quant_predicate=name)
convert(source, str(folder / "mixed_4_6-g64"), quantize=True, quant_predicate="mixed_4_6", q_group_size=64)
for name in ("mxfp4", "nvfp4", "mxfp8"):
    convert(source, str(folder / name), quantize=True, q_mode=name)
command(awq, "awq", "--n-grid", "2", "--num-samples", "4", "--sequence-length", "32")
command(gptq, "gptq")
import os
os.chdir(folder)
command(dynamic_quant, "dynamic_quant")

model, tokenizer, config = load(source, return_config=True)
quantized, _, config = load(str(folder / "mixed_4_6"), return_config=True)
data = [(list(range(40 + i, 56 + i)), 0) for i in range(4)]
dwq.dwq_quantize(
    quantized, lambda batch, _, split: model(batch), optimizers.Adam(learning_rate=1e-4), data, data, batch_size=2,
    max_seq_length=16, seed=1,
)
save(str(folder / "dwq"), source, quantized, tokenizer, config)

model, tokenizer, config = load(str(folder / "mixed_4_6"), return_config=True)
adapter = {"num_layers": 2, "fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0}}
linear_to_lora_layers(model, 2, adapter["lora_parameters"])
weights = {k: mx.random.normal(v.shape) * 0.1 for k, v in tree_flatten(model.parameters()) if "lora" in k}
(folder / "adapter").mkdir()
mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), weights)
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
sys.argv = ["fuse", "--model", str(folder / "mixed_4_6"), "--adapter-path", str(folder / "adapter"),
            "--save-path", str(folder / "fuse")]
fuse.main()

for each in sorted(folder.iterdir()):
    if (each / "config.json").exists():
        model, _ = load(str(each))
        ids = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=n_ids)]
        print("IDS", json.dumps([each.name, ids]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folder of mlx-lm's models, and the ids that mlx-lm generates greedily from each."""
    source = write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny")
    folder = tmp_path_factory.mktemp("theirs")
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(source), str(folder), json.dumps(PROMPT), str(N_IDS)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, dict(json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS "))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_mlx_lm_gives_its_greedy_ids(models: tuple[Path, dict[str, list[int]]], name: str) -> None:
    folder, ids = models
    with mx.stream(mx.cpu):
        module = load_model(folder / name, compute_type="bfloat16").module
        generate_step = import_mlx_lm("mlx_lm.generate").generate_step
        ours = [int(token) for token, _ in generate_step(mx.array(PROMPT), module, max_tokens=N_IDS)]
    assert len(ours) == N_IDS
    assert ours == ids[name]


def test_its_mixed_recipes_leave_the_group_to_mlx(models: tuple[Path, dict[str, list[int]]]) -> None:
    folder, _ = models
    for name in MIXED:
        settings = json.loads((folder / name / "config.json").read_text())["quantization"]
        assert settings["lm_head"]["group_size"] is None
