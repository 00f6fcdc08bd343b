"""Tensors whose names begin with another prefix than Qwen2's "model.", as wrappers and other programs write them.

PEFT writes base_model.model.model.layers..., torch.compile _orig_mod.model..., DistributedDataParallel module.model...,
models with pictures language_model.model... or model.language_model..., and a Qwen2Model without its head layers...

Does not: guess. Where a tensor would keep another name, nothing is renamed, and the architecture's table names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qwq_mlx.files.header import Header, TensorEntry

__all__ = ["with_usual_names"]

Tensors = dict[str, tuple[Header, TensorEntry]]

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


def with_usual_names(
    folder: Path, shards: Sequence[Header], tensors: Mapping[str, tuple[Header, TensorEntry]]
) -> tuple[Sequence[Header], Tensors, list[str]]:
    """Shards and tensors with "model." in place of the prefix that all of them but the output matrix share.

    Returns them as they are where that is their prefix, or no single one is it; and a warning where it is not.
    """
    places = [name.removesuffix(_EMBEDDING) for name in tensors if name.endswith(_EMBEDDING)]
    if len(places) != 1 or places[0] == "model.":
        return shards, dict(tensors), []
    [prefix] = places
    names = {name: _usual(name, prefix) for name in tensors}
    if None in names.values() or len(set(names.values())) != len(names):
        return shards, dict(tensors), []
    renamed = [_renamed(shard, {old: new for old, new in names.items() if new is not None}) for shard in shards]
    warning = f"{folder}: names of tensors begin with {prefix!r}, which is read as 'model.'."
    return renamed, {name: (shard, entry) for shard in renamed for name, entry in shard.tensors.items()}, [warning]


def _usual(name: str, prefix: str) -> str | None:
    if name == _HEAD or name.endswith(f".{_HEAD}"):
        return _HEAD
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else None


def _renamed(shard: Header, names: Mapping[str, str]) -> Header:
    return replace(
        shard,
        tensors={names[old]: replace(entry, name=names[old]) for old, entry in shard.tensors.items()},
        names_in_file={names[old]: old for old in shard.tensors},
    )
