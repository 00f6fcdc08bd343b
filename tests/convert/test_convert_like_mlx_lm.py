"""A conversion is what mlx-lm makes of the same source, tensor by tensor and bit by bit, and mlx-lm runs it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from commands import ENVIRONMENT

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.files.checkpoint import INDEX_NAME, open_checkpoint
from qwq_mlx.files.manifest import verify_full
from qwq_mlx.quant.modes import MODES
from qwq_mlx.quant.recipe import load_recipe, recipe_names

pytestmark = pytest.mark.tiny

# In a process of its own: mlx_lm changes limits and the environment. On the CPU, so that no bit depends on the machine.
THEIRS = """
import json, sys, mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import load
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
question = [{"role": "user", "content": "wait, is the answer 479?"}]
for source, ours, theirs, options in json.loads(sys.argv[1]):
    packings = options.get("quant_predicate")
    if isinstance(packings, dict):
        options["quant_predicate"] = lambda path, *_: packings.get(path, True)
    convert(source, theirs, quantize=True, **options)
    for folder in (ours, theirs):
        model, tokenizer = load(folder)
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        print("IDS", json.dumps([int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=12)]))
"""

PLAIN = "4bit-min-max"
FLOATS = (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32))
OPTIONS = {
    PLAIN: {"q_bits": 4, "q_group_size": 64},
    **{name: {"quant_predicate": name} for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")},
    **{name: {"q_mode": name, "q_bits": bits, "q_group_size": group} for name, bits, group in FLOATS},
}
"""Recipe -> the arguments with which mlx_lm.convert makes the same."""


EVERY = "every"
"""Every number of bits with every group, each in a matrix of one model: a recipe of overrides."""
PACKINGS = {
    f"model.layers.{layer}.{part}_proj": {"bits": bits, "group_size": group, "mode": "affine"}
    for (layer, part), (bits, group) in zip(
        itertools.product(range(3), ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")),
        itertools.product(*MODES["affine"]),
        strict=True,
    )
}


def write_every(folder: Path) -> Path:
    tables = (
        f'[[override]]\nmatch = "{path}"\nbits = {packing["bits"]}\ngroup_size = {packing["group_size"]}\n'
        for path, packing in PACKINGS.items()
    )
    (folder / f"{EVERY}.toml").write_text("[weights]\n" + "".join(tables), encoding="utf-8")
    return folder / f"{EVERY}.toml"


@dataclass(frozen=True)
class Case:
    """A source, our conversion of it, mlx-lm's, and the ids that mlx-lm generates greedily from each."""

    source: Path
    ours: Path
    theirs: Path
    our_ids: list[int]
    their_ids: list[int]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Conversions by us and by mlx-lm, theirs in one process."""
    folder = tmp_path_factory.mktemp("cases")
    plain = write_tiny_checkpoint(folder / "plain")
    every = write_tiny_checkpoint(folder / "source-of-every", n_layers=3, intermediate_size=256)
    recipes = {EVERY: write_every(folder)}
    options = {**OPTIONS, EVERY: {**OPTIONS[PLAIN], "quant_predicate": PACKINGS}}
    sources = {
        "tied-f16": write_tiny_checkpoint(folder / "f16", dtype="F16", tie=True, n_layers=1, n_shards=3),
        "f32": write_tiny_checkpoint(folder / "f32", dtype="F32", n_layers=1, n_shards=1),
        **dict.fromkeys(OPTIONS, plain),
        EVERY: every,
    }
    jobs = []
    for name, source in sources.items():
        recipe = name if name in options else PLAIN
        convert_checkpoint(source, folder / f"{name}-ours", recipe=recipes.get(recipe, recipe))
        jobs.append(
            [*(str(each) for each in (source, folder / f"{name}-ours", folder / f"{name}-theirs")), options[recipe]]
        )
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS ")]
    return {
        name: Case(sources[name], Path(job[1]), Path(job[2]), ids[2 * index], ids[2 * index + 1])
        for index, (name, job) in enumerate(zip(sources, jobs, strict=True))
    }


@pytest.fixture(scope="module")
def plain(cases: dict[str, Case]) -> Case:
    """4 bits by min/max on a bfloat16 checkpoint of two shards."""
    return cases[PLAIN]


CASES = pytest.mark.parametrize("name", ["tied-f16", "f32", *OPTIONS, EVERY])


def arrays(folder: Path) -> dict[str, mx.array]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(mx.load(str(path)))
    return found


def assert_same_tensors(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(np.array(ours[name].view(mx.uint8)), np.array(array.view(mx.uint8))), name


@CASES
def test_every_tensor_is_bit_equal_to_mlx_lms(cases: dict[str, Case], name: str) -> None:
    assert_same_tensors(arrays(cases[name].ours), arrays(cases[name].theirs))


@CASES
def test_mlx_lm_generates_from_our_folder_what_it_generates_from_its_own(cases: dict[str, Case], name: str) -> None:
    assert len(cases[name].our_ids) == 12
    assert cases[name].our_ids == cases[name].their_ids


def test_config_and_index_are_mlx_lms(plain: Case) -> None:
    assert (plain.ours / "config.json").read_bytes() == (plain.theirs / "config.json").read_bytes()
    ours, theirs = (json.loads((each / INDEX_NAME).read_bytes()) for each in (plain.ours, plain.theirs))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert set(ours["weight_map"].values()) == {"model-00001-of-00001.safetensors"}


def test_tokenizer_and_template_files_are_copied_byte_for_byte(plain: Case) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (plain.ours / name).read_bytes() == (plain.source / name).read_bytes()


def test_the_manifest_vouches_for_every_byte(plain: Case) -> None:
    source, ours = plain.source, plain.ours
    manifest = verify_full(ours)
    assert {path.name for path in source.iterdir()} == set(manifest.source.files)
    assert {path.name for path in ours.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest.tensors.keys() == arrays(ours).keys()


def test_relative_errors_of_the_manifest_are_those_of_mlxs_own_unpacking(plain: Case) -> None:
    source, ours = plain.source, plain.ours
    manifest, packed, whole = verify_full(ours), arrays(ours), arrays(source)
    checked = 0
    for name, record in manifest.tensors.items():
        if record.relative_error is None:
            assert not name.endswith("_proj.weight")
            continue
        path = name.removesuffix(".weight")
        scales, biases = (packed[f"{path}.{each}"].astype(mx.float32) for each in ("scales", "biases"))
        weights = whole[name].astype(mx.float32)
        error = mx.dequantize(packed[name], scales, biases, 64, 4, stream=mx.cpu) - weights
        expected = mx.linalg.norm(error, stream=mx.cpu).item() / mx.linalg.norm(weights, stream=mx.cpu).item()
        assert record.relative_error == pytest.approx(expected, rel=1e-3)
        checked += 1
    assert checked == 16


def test_the_rows_may_be_cut_anywhere(plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 kB: five rows at a time, so every matrix has many blocks and a last one of another height."""
    monkeypatch.setattr("qwq_mlx.convert.plan.BLOCK_BYTES", 5 * 256)
    convert_checkpoint(plain.source, tmp_path / "ours", recipe=PLAIN, n_workers=3)
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (plain.ours / name).read_bytes()


def test_shards_are_cut_where_they_are_full_and_hold_each_tensors_parts_together(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwq_mlx.convert.plan.SHARD_BYTES", 60_000)
    convert_checkpoint(plain.source, tmp_path / "ours", recipe=PLAIN)
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert [shard.path.name for shard in checkpoint.shards] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert all(shard.size_bytes - shard.data_start <= 60_000 for shard in checkpoint.shards)
    for name, (shard, entry) in checkpoint.tensors.items():
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            assert {checkpoint.tensors[f"{path}.{part}"][0].path for part in ("weight", "biases")} == {shard.path}
        assert (entry.start - shard.data_start) % {"U32": 4, "BF16": 2}[entry.dtype] == 0
    assert_same_tensors(arrays(tmp_path / "ours"), arrays(plain.theirs))


def test_every_other_recipe_of_the_package_has_the_shapes_of_mx_quantize_and_runs(tmp_path: Path) -> None:
    from qwq_mlx.model.load import load_model

    source = write_tiny_checkpoint(tmp_path / "source", n_layers=1, intermediate_size=256)
    whole = arrays(source)
    for name in sorted(set(recipe_names()) - OPTIONS.keys()):
        packing = load_recipe(name).packing
        ours = tmp_path / name
        convert_checkpoint(source, ours, recipe=name)
        found = arrays(ours)
        for path in ("model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"):
            expected = mx.quantize(whole[f"{path}.weight"], packing.group_size, packing.bits, stream=mx.cpu)
            for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
                assert (found[f"{path}.{part}"].shape, found[f"{path}.{part}"].dtype) == (array.shape, array.dtype)
        logits = load_model(ours).module(mx.array([[5, 260, 17]]))
        assert np.isfinite(np.array(logits.astype(mx.float32))).all()
