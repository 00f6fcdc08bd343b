"""Loading: the logits of mlx-lm and of transformers, and one clear error for every folder that is not a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from commands import ENVIRONMENT

from qwq_mlx.errors import BackendError, LoadError, OptionError, OutOfMemoryError, QwqError
from qwq_mlx.model import load, upstream
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.upstream import import_mlx_lm

pytestmark = pytest.mark.tiny
IDS = [5, 260, 17, 99, 1, 1, 42]  # on the CPU more are multiplied by BLAS, which differs in the last bits


def logits(module: Any) -> np.ndarray:
    return np.array(module(mx.array([IDS])).astype(mx.float32))[0]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quantized(source: Path, output: Path, *, bits: int, group_size: int = 64, mixed: bool = False) -> Path:
    """mlx-lm's own conversion; mixed: the down projections at 8 bits, by name in the config."""
    convert = import_mlx_lm("mlx_lm.convert")

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 8, "group_size": 32} if mixed and "down_proj" in path else True

    convert.convert(
        str(source), str(output), quantize=True, q_bits=bits, q_group_size=group_size, quant_predicate=predicate
    )
    return output


def mlx_lm_logits(folder: Path) -> np.ndarray:
    """The same folder through mlx_lm.load, its floats cast to float32 as on our CPU path."""
    module, _ = import_mlx_lm("mlx_lm.utils").load(str(folder))
    module.set_dtype(mx.float32)
    return logits(module)


@pytest.mark.parametrize("tie", [False, True])
def test_float32_logits_equal_transformers(tmp_path: Path, tie: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_checkpoint(tmp_path, tie=tie, seed=3)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    model = load_model(folder, compute_type="float32")
    assert relative_error(logits(model.module), expected) < 1e-4


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_logits_equal_mlx_lm_for_every_float_type(tmp_path: Path, dtype: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, dtype=dtype)
    np.testing.assert_array_equal(logits(load_model(folder, compute_type="float32").module), mlx_lm_logits(folder))


@pytest.mark.parametrize(("bits", "group_size", "mixed"), [(4, 64, False), (8, 32, False), (4, 64, True)])
def test_logits_of_a_conversion_equal_mlx_lm(
    tmp_path: Path, tiny_checkpoint: Path, bits: int, group_size: int, mixed: bool
) -> None:
    folder = quantized(tiny_checkpoint, tmp_path / "q", bits=bits, group_size=group_size, mixed=mixed)
    model = load_model(folder, compute_type="float32")
    np.testing.assert_array_equal(logits(model.module), mlx_lm_logits(folder))
    assert model.weights == ("4/8-bit weights, group 32/64" if mixed else f"{bits}-bit weights, group {group_size}")
    dtypes = {value.dtype for _, value in flat(model.module)}
    assert dtypes == {mx.uint32, mx.float32}


def flat(module: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(module.parameters()))


def test_the_compute_type_follows_the_backend_or_the_caller(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    expected = "float32" if mx.default_device().type == mx.cpu else "bfloat16"
    assert model.compute_type == expected
    assert {value.dtype for _, value in flat(model.module)} == {getattr(mx, expected)}
    as_bfloat16 = load_model(tiny_checkpoint, compute_type="bfloat16")
    assert {value.dtype for _, value in flat(as_bfloat16.module)} == {mx.bfloat16}
    assert as_bfloat16.weights == "bf16 weights"


def test_a_loaded_model_says_what_it_is(tiny_checkpoint: Path) -> None:
    model = load_model(str(tiny_checkpoint))
    added = model.tokenizer.added
    assert model.folder == tiny_checkpoint
    assert model.stop_ids == {added["<|im_end|>"], added["<|endoftext|>"]}
    assert (model.defaults.temperature, model.config.num_hidden_layers) == (0.7, 2)
    assert model.weights_bytes == 2 * sum(value.size for _, value in flat(model.module))
    assert not model.module.training


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(n_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-n_bytes])

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def no_end(folder: Path) -> None:
    edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncate(1), r"model-00002-of-00002\.safetensors: "),
        (truncate(5_000), r"model-00002-of-00002\.safetensors: "),
        (remove("model-00001-of-00002.safetensors"), r"1 of 2 shards missing: model-00001-of-00002\.safetensors"),
        (remove("config.json"), r"config\.json: there is no such file"),
        (remove("tokenizer.json"), r"tokenizer\.json: there is no such file"),
        (config(num_hidden_layers=3), r"12 missing: model\.layers\.2\.input_layernorm\.weight"),
        (config(num_hidden_layers=1), r"12 unknown: model\.layers\.1\.input_layernorm\.weight"),
        (config(intermediate_size=256), r"mlp\.down_proj\.weight \(128, 192\), expected \(128, 256\)"),
        (
            config(num_hidden_layers=10_000_000),
            "num_hidden_layers is 10000000, expected a whole number from 1 to 1,024",
        ),
        (config(tie_word_embeddings=True), r"but lm_head\.weight is not model\.embed_tokens"),
        (config(vocab_size=10), "eos_token_id is "),
        (
            config(quantization={"bits": 4, "group_size": 64}, vocab_size=321),
            r"lm_head.weight \(320, 128\), expected \(321",
        ),
        (no_end, "neither generation_config.json nor config.json nor tokenizer_config.json says which id ends"),
    ],
)
def test_a_damaged_folder_is_refused_before_mlx_reads_a_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], text: str
) -> None:
    def unreachable(*_: object) -> None:
        raise AssertionError("a weight was read before all checks were done")

    monkeypatch.setattr(load, "_load_weights", unreachable)
    damage(folder)
    with pytest.raises(QwqError, match=text):
        load_model(folder)


def test_a_folder_that_is_not_there_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere: there is no such folder\. Give the folder of a model; python -m"):
        load_model(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.json: is a file, expected a model folder"):
        load_model(tiny_checkpoint / "config.json")


def test_a_compute_type_that_does_not_exist_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="compute_type is 'float16', expected 'float32', 'bfloat16' or None"):
        load_model(tmp_path / "nowhere", compute_type="float16")  # type: ignore[arg-type]


def test_a_shard_that_mlx_cannot_read_is_named(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str, format: str) -> None:
        raise RuntimeError("[read] failed")

    monkeypatch.setattr(mx, "load", fails)
    with pytest.raises(LoadError, match=r"model-00001-of-00002\.safetensors: MLX cannot read it \(\[read\] failed\)\."):
        load_model(tiny_checkpoint)


def test_a_machine_without_a_backend_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(upstream.importlib, "import_module", missing)
    with pytest.raises(
        BackendError, match=r"MLX cannot start .*libmlx\.so.* pip install 'mlx\[cpu\]', or 'mlx\[cuda13\]'"
    ):
        upstream.import_mlx()


def test_no_code_of_a_folder_is_run(folder: Path) -> None:
    """auto_map, model_file, a class name and a pickle that would write a file: none of them may have run."""
    proof = folder.parent / "ran"
    code = f"open({str(proof)!r}, 'w').close()\n"
    for name in ("evil.py", "modeling_qwen2.py", "tokenization_qwen2.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, model_file="evil.py")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    script = (
        "import sys\n"
        "run = set()\n"
        "sys.addaudithook(lambda event, args: event == 'exec' and run.add(getattr(args[0], 'co_filename', '')))\n"
        "from qwq_mlx.model.load import load_model\n"
        "load_model(sys.argv[1])\n"
        "print(len(run) > 100, sorted(name for name in run if name.startswith(sys.argv[1])))\n"
    )
    assert in_child(script, str(folder), cwd=folder) == "True []\n"
    assert not proof.exists()


def in_child(script: str, *arguments: str, cwd: Path | None = None) -> str:
    """stdout of a fresh interpreter in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mlx_lm_leaves_limits_and_environment_alone() -> None:
    script = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (900, 5000))\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), resource.setrlimit\n"
        "from qwq_mlx.model.upstream import import_mlx_lm\n"
        "import_mlx_lm('mlx_lm.models.qwen2')\n"
        "after = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), resource.setrlimit\n"
        "print(before == after)\n"
    )
    assert in_child(script) == "True\n"


def test_the_folder_alone_can_be_opened_without_mlx(tiny_checkpoint: Path) -> None:
    script = (
        "import sys\n"
        "from qwq_mlx.model.folder import open_model_folder\n"
        "print(open_model_folder(sys.argv[1]).weights, sorted({'mlx', 'mlx_lm', 'transformers'} & set(sys.modules)))\n"
    )
    assert in_child(script, str(tiny_checkpoint)) == "bf16 weights []\n"
    assert open_model_folder(tiny_checkpoint).packed == {}


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_modes_give_the_logits_of_mlx_lm(tiny_checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    from mlx_lm.utils import load_model as load_theirs

    from qwq_mlx import convert_checkpoint

    folder = tmp_path / recipe
    convert_checkpoint(tiny_checkpoint, folder, recipe=recipe)
    model = load_model(folder)
    assert model.weights.startswith(f"{recipe} ")
    theirs, _ = load_theirs(folder)
    theirs.set_dtype(mx.float32)
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert mx.array_equal(model.module(ids), theirs(ids))


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_memory_that_runs_out_while_weights_are_read_is_told(
    kind: type[Exception], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise kind("[malloc] Unable to allocate 1048576 bytes.")

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out while the weights were read \(.*take a model of fewer"):
        load_model(tiny_checkpoint)


def test_another_failure_of_mlx_keeps_its_name(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        load_model(tiny_checkpoint)


def test_a_shard_cut_while_it_is_loaded_is_a_named_error(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    shard = max(folder.glob("*.safetensors"))
    load_weights = nn.Module.load_weights

    def cut(*arguments: Any, **options: Any) -> Any:
        os.truncate(shard, shard.stat().st_size // 2)  # between the headers and the reading of the weights
        return load_weights(*arguments, **options)

    monkeypatch.setattr(nn.Module, "load_weights", cut)
    with pytest.raises(LoadError, match=r"safetensors: has [\d,]+ bytes, had [\d,]+ when its header was read"):
        load_model(folder)


def test_loading_tells_how_many_layers_are_in_memory(tiny_checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    load_model(tiny_checkpoint, progress=lambda n_done, n_layers: told.append((n_done, n_layers)))
    assert told == [(0, 2), (1, 2), (2, 2)]
