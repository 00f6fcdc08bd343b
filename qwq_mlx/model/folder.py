"""A model folder, checked from its headers alone: config, tensors, packing, and nothing allocated.

This is the first half of loading, and all that a memory plan needs, so it runs on machines without MLX.

Does not: read a weight, import MLX, or look at the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.errors import LoadError
from qwq_mlx.files.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint
from qwq_mlx.files.gguf.checkpoint import opened_gguf
from qwq_mlx.files.gguf.stores import find_gguf
from qwq_mlx.files.manifest import MANIFEST_NAME, check_sizes
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes
from qwq_mlx.model.layout import Packing, check_layout, packings
from qwq_mlx.model.tensor_types import FLOAT_TYPES, check_float_types, float_type_warnings

__all__ = ["ModelFolder", "open_model_folder", "opened_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A folder whose config and tensors agree.

    packed: matrix path -> its packing; empty for a checkpoint of floats.
    has_manifest: it is a conversion of this package, and its headers are those that it was made with.
    """

    path: Path
    checkpoint: Checkpoint
    config: Qwen2Config
    packed: Mapping[str, Packing]
    has_manifest: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the folder is ignored, linked from elsewhere or of an odd type, in sentences."""
        about_types = [] if self.packed or self.has_manifest else float_type_warnings(self.checkpoint)
        return (*self.checkpoint.warnings, *about_types)

    @property
    def weights(self) -> str:
        """The weights in words, for people: "4-bit weights, group 64"."""
        if not self.packed:
            dtypes = sorted({entry.dtype.lower() for _, entry in self.checkpoint.tensors.values()})
            return f"{'/'.join(dtypes)} weights"
        bits = sorted({packing.bits for packing in self.packed.values()})
        groups = sorted({packing.group_size for packing in self.packed.values()})
        modes = sorted({packing.mode for packing in self.packed.values()} - {"affine"})
        named = f"{'/'.join(modes)} " if modes else ""
        return f"{named}{'/'.join(map(str, bits))}-bit weights, group {'/'.join(map(str, groups))}"


def open_model_folder(folder: str | Path, *, follow_links: bool = False) -> ModelFolder:
    """Check a checkpoint or a conversion: file sizes against the manifest, headers, config, every tensor.

    follow_links: read shards that links out of the folder lead to.
    Raises LoadError or SourceError naming the file or tensor, what was found and what was expected.
    """
    path = Path(folder)
    _check_is_folder(path)
    has_manifest = (path / MANIFEST_NAME).exists()
    if has_manifest:
        check_sizes(path)
    checkpoint = open_checkpoint(path, follow_links=follow_links)
    where = str(path / CONFIG_NAME)
    config = Qwen2Config.from_json(checkpoint.config, where=where)
    packed = packings(checkpoint.config, config, checkpoint.tensors, where=where)
    tensors = {name: (entry.dtype, tuple(entry.shape)) for name, (_, entry) in checkpoint.tensors.items()}
    check_layout(config, packed, tensors, where=str(path))
    if not has_manifest:
        check_float_types(checkpoint, [name for name, (dtype, _) in tensors.items() if dtype in FLOAT_TYPES])
    return ModelFolder(path=path, checkpoint=checkpoint, config=config, packed=packed, has_manifest=has_manifest)


@contextmanager
def opened_model(source: str | Path, *, follow_links: bool = False) -> Iterator[ModelFolder]:
    """A folder as `open_model_folder` has it, or a GGUF as the floats that it means; small files made for a GGUF are in
    `checkpoint.folder` as long as the context is. Raises as that does.
    """
    if (file := find_gguf(source)) is None:
        yield open_model_folder(source, follow_links=follow_links)
        return
    with opened_gguf(file) as checkpoint:
        where = str(checkpoint.where)
        config = Qwen2Config.from_json(checkpoint.config, where=where)
        shapes = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}
        check_tensors(tensor_shapes(config), shapes, where=where)
        yield ModelFolder(path=checkpoint.where, checkpoint=checkpoint, config=config, packed={})


def _check_is_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        if path.suffix == ".gguf":
            raise LoadError(
                f"{path}: is a file, expected a model folder. Convert it first: "
                f"python -m qwq_mlx.convert --source {path} --output FOLDER"
            )
        raise LoadError(f"{path}: is a file, expected a model folder (config.json, *.safetensors, tokenizer.json).")
    raise LoadError(
        f"{path}: there is no such folder. Give the folder of a model; "
        "python -m qwq_mlx.convert makes one from a checkpoint."
    )
