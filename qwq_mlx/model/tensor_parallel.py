"""A model that several processes hold together (tensor parallel): which part of a tensor is whose.

Queries, keys, values, gate and up are split by rows, so each rank has its own heads and its own cache of them; output
and down are split by columns, and what they give is summed over the ranks, twice a layer. Norms, embeddings and the
output matrix are whole on every rank. The layers are mlx_lm's sharded ones.

Does not: read weights (`ranks` does), or import MLX.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.layout import Packing

__all__ = ["check_ranks", "possible_ranks", "split_axis"]

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_MOST = 64


def split_axis(name: str) -> int | None:
    """The axis of a tensor that is split over ranks; None where each has it whole.

    >>> split_axis("model.layers.0.mlp.down_proj.scales"), split_axis("model.norm.weight")
    (1, None)
    """
    module = name.split(".")[-2] if "." in name else ""
    return 0 if module in _BY_ROWS else 1 if module in _BY_COLUMNS else None


def possible_ranks(config: Qwen2Config, packed: Mapping[str, Packing]) -> list[int]:
    """Numbers of processes that can hold this model together."""
    return [n for n in range(1, _MOST + 1) if _obstacle(config, packed, n) is None]


def check_ranks(config: Qwen2Config, packed: Mapping[str, Packing], n_ranks: int) -> None:
    """Raises OptionError naming what does not divide, and the numbers of processes that are possible."""
    obstacle = _obstacle(config, packed, n_ranks)
    if obstacle is not None:
        possible = ", ".join(str(n) for n in possible_ranks(config, packed) if n > 1)
        raise OptionError(
            f"{n_ranks} processes cannot hold this model together: {obstacle}. "
            + (f"Possible: {possible}." if possible else "It runs in one process alone.")
        )


def _obstacle(config: Qwen2Config, packed: Mapping[str, Packing], n_ranks: int) -> str | None:
    for what, n in (
        ("attention heads", config.num_attention_heads),
        ("key and value heads", config.num_key_value_heads),
        ("rows of gate and up", config.intermediate_size),
    ):
        if n % n_ranks:
            return f"its {n:,} {what} are no multiple of {n_ranks}"
    for path, packing in packed.items():
        columns = config.hidden_size if path.endswith("o_proj") else config.intermediate_size
        if split_axis(f"{path}.weight") == 1 and columns % (n_ranks * packing.group_size):
            return f"{columns:,} columns of {path} are no multiple of {n_ranks} groups of {packing.group_size}"
    return None
