"""Tensors of a checkpoint that no program reads: rotary frequencies, and an output matrix that is the embedding.

Does not: drop anything else; what the architecture does not know is refused (`model.architecture`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.header import Header, TensorEntry

__all__ = ["drop_unread_tensors"]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_BYTES = 1 << 20


def drop_unread_tensors(
    folder: Path, config: Mapping[str, Any], tensors: MutableMapping[str, tuple[Header, TensorEntry]]
) -> list[str]:
    """Remove them from `tensors`; returns a warning for each kind.

    Source: mlx_lm.models.qwen2.Model.sanitize, which drops the same two kinds.
    Raises SourceError for a tied output matrix whose first MiB is not the embedding's: then config.json is wrong. Of a
    shard that is not fetched yet this cannot be told.
    """
    warnings = []
    if frequencies := [name for name in tensors if name.endswith(".rotary_emb.inv_freq")]:
        warnings.append(f"ignored {len(frequencies):,} inv_freq buffers ({frequencies[0]} ...): rope_theta says them.")
        for name in frequencies:
            del tensors[name]
    if config.get("tie_word_embeddings") is True and _HEAD in tensors and _EMBEDDING in tensors:
        if not _are_alike(tensors[_HEAD], tensors[_EMBEDDING]):
            raise SourceError(
                f"{folder}: config.json has tie_word_embeddings true, but {_HEAD} is not {_EMBEDDING}. Set it to false "
                "if the model has an output matrix of its own, else fetch the checkpoint again, all from one commit."
            )
        del tensors[_HEAD]
        warnings.append(f"ignored {_HEAD}: config.json has tie_word_embeddings true, and it is {_EMBEDDING}.")
    return warnings


def _are_alike(one: tuple[Header, TensorEntry], other: tuple[Header, TensorEntry]) -> bool:
    if (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    if not (one[0].path.exists() and other[0].path.exists()):
        return True
    return _first_bytes(*one) == _first_bytes(*other)


def _first_bytes(shard: Header, entry: TensorEntry) -> bytes:
    try:
        with shard.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(min(_COMPARED_BYTES, entry.end - entry.start))
    except OSError as error:
        raise SourceError(f"{shard.path}: cannot be read {system_said(error, 'Check its permissions.')}") from error
