"""What a memory plan is asked for: a model's shape, and what a run does with it.

Does not: plan anything (`plan` does), or know how much memory there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.split import Split

__all__ = ["BACKENDS", "FLOAT_BYTES", "KV_GROUP", "Backend", "ModelShape", "Workload"]

Backend = Literal["metal", "cuda", "cpu"]
BACKENDS: tuple[Backend, ...] = ("metal", "cuda", "cpu")

KV_GROUP = 64
"""Numbers of a quantized cache that share a scale and a bias."""
FLOAT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A config and how its matrices are packed: all that a plan needs of a model."""

    config: Qwen2Config
    packed: Mapping[str, Packing]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run asks for.

    context: positions, prompt and output together; None is the model's whole context.
    kv_bits: 8 and 4 quantize the cache in groups of 64; None keeps it in the compute type.
    n_sequences: decoded side by side, each with its own cache.
    n_shared: leading positions that all of them have in common, held once; 0 for none.
    prefill_step: prompt ids per pass.
    compute_type: "float32" or "bfloat16"; None picks by backend.
    draft: a smaller model that guesses n_draft ids at a time, which the model then checks in one pass.
    drafts_from_texts: whether n_draft ids at a time are guessed from the texts so far, without such a model.
    n_draft: ids that are guessed at a time.
    split: who holds what, of processes that hold the model together; None is one process.
    rank: the one of them that is planned.
    With one sequence a draft model is planned as mlx-lm decodes with one, which is what this package does at most.
    """

    context: int | None = None
    kv_bits: int | None = None
    n_sequences: int = 1
    n_shared: int = 0
    prefill_step: int = 2048
    compute_type: str | None = None
    draft: ModelShape | None = None
    drafts_from_texts: bool = False
    n_draft: int = 3
    split: Split | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        for name, value, high in (
            ("context", self.context, 2**31 - 1),
            ("n_sequences", self.n_sequences, 100_000),
            ("prefill_step", self.prefill_step, 2**31 - 1),
            ("n_draft", self.n_draft, 1_000),
        ):
            if name == "context" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= high:
                raise OptionError(f"{name} is {value!r}, expected a whole number from 1 to {high:,}.")
        if type(self.n_shared) is not int or not 0 <= self.n_shared < (self.context or 2**31):
            raise OptionError(f"n_shared is {self.n_shared!r}, expected a whole number from 0 to below the context.")
        n_ranks = 1 if self.split is None else self.split.n_ranks
        if type(self.rank) is not int or not 0 <= self.rank < n_ranks:
            raise OptionError(f"rank is {self.rank!r}, expected a whole number below {n_ranks}.")
        if self.kv_bits not in (None, 4, 8):
            raise OptionError(f"kv_bits is {self.kv_bits!r}, expected None, 8 or 4.")
        if self.compute_type not in (None, *FLOAT_BYTES):
            raise OptionError(f"compute_type is {self.compute_type!r}, expected None, float32 or bfloat16.")
