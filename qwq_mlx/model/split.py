"""Who holds what of a model that several processes hold together.

Tensor parallel: each rank has a part of every layer. Queries, keys, values, gate and up are split by rows, so each
rank has its own heads and its own cache of them; output and down are split by columns, and what they give is summed
over the ranks, twice a layer. Embeddings and norms of layers are whole on every rank. All ranks work at the same time,
so a token takes less time where the sums are quick.

Pipeline: each rank has consecutive layers, as many as its memory takes, and sends what they give to the next one. Rank
0 has the last layers, as in mlx_lm. The ranks work one after another, so a token takes as long as on one machine.

Either way rank 0 alone has the output matrix, for it alone draws.

Does not: read weights (`ranks` does), choose a split (`memory.splits` does), or import MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.layout import Packing
from qwq_mlx.quant.recipe import layer_of

__all__ = ["Split", "SplitKind", "check_split", "possible_ranks", "split_axis", "tensor_split"]

SplitKind = Literal["tensor", "pipeline"]

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_MOST = 64


@dataclass(frozen=True, slots=True)
class Split:
    """Who holds what; plain data, so that one process can decide it and send it to the others.

    kind: "tensor" or "pipeline".
    n_layers: of each rank; in a tensor split all of them.

    >>> split = Split("pipeline", (24, 40))
    >>> split.layers_of(0), split.layers_of(1)
    (range(40, 64), range(0, 40))
    """

    kind: SplitKind
    n_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_layers", tuple(self.n_layers))  # JSON has lists
        is_even = self.kind == "pipeline" or len(set(self.n_layers)) == 1
        if self.kind not in ("tensor", "pipeline") or not is_even or not all(n > 0 for n in self.n_layers):
            raise OptionError(
                f"split is {self.kind!r} with {list(self.n_layers)} layers, expected 'tensor' with the same number for "
                "each process, or 'pipeline' with at least one each."
            )

    @property
    def n_ranks(self) -> int:
        """Processes."""
        return len(self.n_layers)

    def layers_of(self, rank: int) -> range:
        """The layers of a rank."""
        start = sum(self.n_layers[rank + 1 :]) if self.kind == "pipeline" else 0
        return range(start, start + self.n_layers[rank])

    def n_heads_of(self, n_heads: int) -> int:
        """How many of so many heads, or rows of a split matrix, a rank has."""
        return n_heads // self.n_ranks if self.kind == "tensor" else n_heads

    def kv_heads_of(self, rank: int, config: Qwen2Config) -> range:
        """The key and value heads in a rank's caches."""
        n = self.n_heads_of(config.num_key_value_heads)
        return range(rank * n, (rank + 1) * n) if self.kind == "tensor" else range(n)

    def holds(self, name: str, rank: int, config: Qwen2Config) -> bool:
        """Whether a rank has a tensor of this name, or a part of it."""
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers_of(rank)
        if name.startswith("lm_head."):
            return rank == 0
        if name.startswith("model.norm."):
            return rank == 0 or self.kind == "tensor"
        is_first = self.kind == "tensor" or rank == self.n_ranks - 1
        return is_first or (rank == 0 and config.tie_word_embeddings)

    def axis_of(self, name: str) -> int | None:
        """The axis of a tensor of which a rank has a part; None where it is whole."""
        return split_axis(name) if self.kind == "tensor" else None

    def describe(self, rank: int) -> str:
        """What a rank has, for people."""
        layers = self.layers_of(rank)
        if self.kind == "tensor":
            return f"1/{self.n_ranks} of each layer"
        return f"layer{'s' * (len(layers) > 1)} {layers.start}" + (f" to {layers.stop - 1}" if len(layers) > 1 else "")


def tensor_split(config: Qwen2Config, n_ranks: int) -> Split:
    """Each rank a part of every layer."""
    return Split("tensor", (config.num_hidden_layers,) * n_ranks)


def split_axis(name: str) -> int | None:
    """The axis of a tensor that a tensor split divides; None where each rank has it whole.

    >>> split_axis("model.layers.0.mlp.down_proj.scales"), split_axis("model.norm.weight")
    (1, None)
    """
    module = name.split(".")[-2] if "." in name else ""
    return 0 if module in _BY_ROWS else 1 if module in _BY_COLUMNS else None


def possible_ranks(config: Qwen2Config, packed: Mapping[str, Packing]) -> list[int]:
    """Numbers of processes that can hold this model tensor parallel."""
    return [n for n in range(1, _MOST + 1) if tensor_obstacle(config, packed, n) is None]


def check_split(split: Split, config: Qwen2Config, packed: Mapping[str, Packing]) -> None:
    """Raises OptionError naming what does not divide, and the numbers of processes that are possible."""
    if split.n_ranks > _MOST:
        raise OptionError(f"{split.n_ranks} processes are asked for, expected at most {_MOST}.")
    if split.kind == "pipeline":
        if sum(split.n_layers) != config.num_hidden_layers:
            raise OptionError(
                f"split has {list(split.n_layers)} layers, {sum(split.n_layers)} together, expected "
                f"{config.num_hidden_layers}, which is what the model has."
            )
        return
    if split.n_layers[0] != config.num_hidden_layers:
        raise OptionError(f"split has {split.n_layers[0]} layers, expected {config.num_hidden_layers}.")
    obstacle = tensor_obstacle(config, packed, split.n_ranks)
    if obstacle is not None:
        possible = ", ".join(str(n) for n in possible_ranks(config, packed) if n > 1)
        instead = " A pipeline has no such limit." if split.n_ranks <= config.num_hidden_layers else ""
        raise OptionError(
            f"{split.n_ranks} processes cannot hold this model tensor parallel: {obstacle}. "
            + (f"Possible: {possible}." if possible else "It runs in one process alone.")
            + instead
        )


def tensor_obstacle(config: Qwen2Config, packed: Mapping[str, Packing], n_ranks: int) -> str | None:
    """What does not divide among so many processes, in words; None where all does."""
    sizes: Sequence[tuple[str, int]] = (
        ("attention heads", config.num_attention_heads),
        ("key and value heads", config.num_key_value_heads),
        ("rows of gate and up", config.intermediate_size),
    )
    for what, n in sizes:
        if n % n_ranks:
            return f"its {n:,} {what} are no multiple of {n_ranks}"
    for path, packing in packed.items():
        columns = config.hidden_size if path.endswith("o_proj") else config.intermediate_size
        if split_axis(f"{path}.weight") == 1 and columns % (n_ranks * packing.group_size):
            return f"{columns:,} columns of {path} are no multiple of {n_ranks} groups of {packing.group_size}"
    return None
