"""Ways to damage a checkpoint's folder, and the checks that must notice: shared by the tests of bad checkpoints.

Does not: damage what the package wrote; every damage is made from the outside view of tests/checkpoints.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import safetensors_bytes, write_json

from qwq_mlx.files.checkpoint import open_checkpoint
from qwq_mlx.files.header import read_header
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3900000000\n"
Damage = Callable[[Path], object]


def check(folder: Path) -> None:
    """What a load or a conversion does before anything is allocated."""
    checkpoint = open_checkpoint(folder)
    config = Qwen2Config.from_json(checkpoint.config, where=str(folder / CONFIG))
    found = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}
    check_tensors(tensor_shapes(config), found, where=str(folder))


def write(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes: Any) -> Damage:
    """Change fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / CONFIG).read_text())
        value.update(changes)
        write_json(folder / CONFIG, {key: field for key, field in value.items() if field is not None})

    return damage


def config_text(old: str, new: str) -> Damage:
    """Replace text in config.json, for what json.dumps would not write."""

    def damage(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))

    return damage


def index(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        edit(value)
        write_json(folder / INDEX, value)

    return damage


def replace(name: str, put: Callable[[Path], object]) -> Damage:
    """Put something else where a file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return damage


def tensors(edit: Callable[[dict[str, tuple[str, tuple[int, ...], bytes]]], object], *, name: str = SECOND) -> Damage:
    """Change a shard's tensors, keeping the index as true as it was."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        entries = read_header(folder / name).tensors
        found = {key: (e.dtype, e.shape, content[e.start : e.end]) for key, e in entries.items()}
        edit(found)
        (folder / name).write_bytes(safetensors_bytes(found, {"format": "pt"}))
        value = json.loads((folder / INDEX).read_text())
        value["weight_map"] = {key: shard for key, shard in value["weight_map"].items() if shard != name}
        value["weight_map"].update(dict.fromkeys(found, name))
        write_json(folder / INDEX, value)

    return damage


def move(name: str, to: str, *, link: bool) -> Damage:
    """Move a file to another place, perhaps leaving a link."""

    def damage(folder: Path) -> None:
        target = folder / to
        target.parent.mkdir(exist_ok=True)
        (folder / name).rename(target)
        if link:
            (folder / name).symlink_to(target)

    return damage


def point(tensor: str, shard: Any) -> Damage:
    return index(lambda value: value["weight_map"].update({tensor: shard}))


def only(*names: str) -> Damage:
    """Remove all but these files."""
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names]
