"""What is converted though it looks odd is named in a warning; what no figure can describe is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

import qwq_mlx
from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import ConversionError
from qwq_mlx.files.header import read_header

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def test_zero_tensors_and_zero_pages_are_converted_with_a_warning(source: Path) -> None:
    header = read_header(source / SHARDS[0])
    raw = bytearray((source / SHARDS[0]).read_bytes())
    bias = header.tensors["model.layers.0.self_attn.k_proj.bias"]
    raw[bias.start : bias.end] = bytes(bias.end - bias.start)
    whole, part = (header.tensors[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.up_proj"))
    raw[whole.start : whole.end] = bytes(whole.end - whole.start)
    raw[part.start : part.start + 8192] = bytes(8192)
    (source / SHARDS[0]).write_bytes(raw)
    _, *warnings = convert_checkpoint(source, source.parent / "out").warnings
    compare = "Compare the shard's sha256 with the source's."
    assert warnings == [
        f"{SHARDS[0]}: {part.name} has 2 pages (4,096 bytes) of zeros, as lost writes leave them. {compare}",
        f"{SHARDS[0]}: every weight of {bias.name} is zero. {compare}",
        f"{SHARDS[0]}: every weight of {whole.name} is zero. {compare}",
    ]


def set_weight(source: Path, tensor: str, bits: int) -> None:
    """The 777th number of a matrix, or the third of a vector; bits: of a bfloat16."""
    for path in source.glob("*.safetensors"):
        if entry := read_header(path).tensors.get(tensor):
            raw = bytearray(path.read_bytes())
            position = entry.start + 2 * (777 if len(entry.shape) == 2 else 2)
            raw[position : position + 2] = bits.to_bytes(2, "little")
            path.write_bytes(raw)


@pytest.mark.parametrize("recipe", ["4bit", "4bit-min-max", "mxfp4"])
@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "row 6, column 9"),
        ("model.layers.0.input_layernorm.weight", "position 2"),
    ],
)
def test_a_weight_whose_square_is_no_number_is_named_like_a_nan(
    source: Path, tensor: str, where: str, recipe: str
) -> None:
    """One flipped bit of an exponent makes 8.5e37; the manifest could not say what rounding cost."""
    set_weight(source, tensor, 0xFE80)
    with pytest.raises(
        ConversionError, match=rf"{tensor}: the weight at {where} has the size 8\.51e\+37, expected none near 1e19\."
    ):
        convert_checkpoint(source, source.parent / "out", recipe=recipe)
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "shown"),
    [("4bit-min-max", r"2\.7\d %"), ("8bit", r"0\.07\d+ %"), ("mxfp4", r"0\.13\d %")],
)
def test_a_matrix_whose_error_is_unlike_the_others_is_warned_of(source: Path, recipe: str, shown: str) -> None:
    """One weight of 1,024 among those of 0.02: alike matrices lose 9 % at 4 bits, 0.5 % at 8, 12 % in mxfp4."""
    set_weight(source, "model.layers.0.self_attn.q_proj.weight", 0x4480)
    _, warning = convert_checkpoint(source, source.parent / "out", recipe=recipe).warnings
    assert re.fullmatch(
        rf"{SHARDS[0]}: rounding cost model\.layers\.0\.self_attn\.q_proj\.weight {shown} of its size, the median of "
        r"16 matrices packed alike is [\d.]+ %\. Weights far larger than the rest, as a flipped bit leaves them, look "
        r"like that\. Compare the shard's sha256 with the source's\.",
        warning,
    )


def test_a_good_checkpoint_has_no_warning_but_for_a_template_that_nobody_knows(source: Path) -> None:
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    digest = hashlib.sha256(template.encode() + b"\n").hexdigest()
    for recipe in ("2bit", "4bit", "mixed_2_6", "mxfp4"):
        (warning,) = convert_checkpoint(source, source.parent / recipe, recipe=recipe).warnings
        assert warning.startswith(
            f"the chat template (sha256 {digest}) is none that this package knows. It is a program"
        )
    pocket = Path(qwq_mlx.__file__).parent / "pocket" / "checkpoint"
    assert convert_checkpoint(pocket, source.parent / "pocket", quality=False).warnings == ()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (warning,) = convert_checkpoint(source, source.parent / "none", dry_run=True).warnings
    assert "has no chat template, so the conversion will not answer questions" in warning
