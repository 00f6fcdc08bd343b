"""What convert refuses or warns of is not run in silence either: NaN, infinity, 1e36, lost pages, mixed types."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.errors import LoadError, SourceError
from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.model.load import ComputeType, load_model

pytestmark = pytest.mark.tiny
MATRIX, NORM, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def overwrite(folder: Path, name: str, data: bytes, at: int = 0) -> str:
    """Write over a tensor's bytes from a position on; returns the name of its file."""
    shard, entry = open_checkpoint(folder).tensors[name]
    with shard.path.open("r+b") as file:
        file.seek(entry.start + at)
        file.write(data)
    return shard.path.name


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bits", "shown"), [(0x7FC0, "nan"), (0x7F80, "inf"), (0xFF80, "-inf"), (0x7BA0, r"1\.66e\+36")]
)
def test_a_weight_that_no_model_has_is_named(folder: Path, bits: int, shown: str, compute_type: ComputeType) -> None:
    columns = open_checkpoint(folder).tensors[MATRIX][1].shape[1]
    file = overwrite(folder, MATRIX, np.array([bits], "<u2").tobytes(), at=2 * (3 * columns + 5))
    with pytest.raises(LoadError, match=rf"{file}: tensor {MATRIX}: the weight at \[3, 5\] is {shown}, expected a "):
        load_model(folder, compute_type=compute_type)


def test_lost_pages_and_zero_tensors_are_told(folder: Path) -> None:
    first = overwrite(folder, EMBEDDING, bytes(3 * 4096), at=1000)
    second = overwrite(folder, NORM, bytes(256))
    warnings = load_model(folder).warnings
    assert [each.split(": ", 1)[1].split(" of zeros")[0] for each in warnings] == [
        f"{EMBEDDING} has 3 pages (4,096 bytes)",
        f"every value of {NORM} is zero. Compare the file's sha256 with the source's.",
    ]
    assert first in warnings[0] and second in warnings[1]


def test_a_flipped_label_is_refused_and_another_type_than_the_config_says_is_told(folder: Path, tmp_path: Path) -> None:
    path = open_checkpoint(folder).tensors[NORM][0].path
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"%s":{"dtype":"BF16"' % NORM.encode(), b'"%s":{"dtype":"F16" ' % NORM.encode()))
    assert path.read_bytes() != raw
    with pytest.raises(SourceError, match=rf"another type than BF16, .*: F16: {NORM}\."):
        load_model(folder)
    other = write_tiny_checkpoint(tmp_path / "f16", dtype="F16")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"bfloat16"'))
    assert load_model(other).warnings == (f"{config}: torch_dtype 'bfloat16' is ignored: the tensors are float16.",)
