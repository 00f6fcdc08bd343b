"""The tensor types of GGUF: how many weights a block has, and how many bytes it takes.

Source: ggml.h (enum ggml_type) and ggml-common.h of ggml-org/ggml; a test compares with the gguf package.

Does not: decode a block (`quant.gguf_blocks` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FLOAT_TYPES", "INTEGER_TYPES", "TYPES", "BlockType"]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A tensor type. n_weights, n_bytes: of one block; rows are whole blocks."""

    name: str
    n_weights: int
    n_bytes: int


TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
"""Number in the file -> type. Numbers that are missing were taken out of ggml (Q4_2, Q4_0_4_4 and their like)."""

FLOAT_TYPES = ("F32", "F16", "BF16")
"""Types whose bytes are those of safetensors' type of the same name."""

INTEGER_TYPES = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
"""Types that weights of a model never have in a file: indices, and what llama.cpp computes with."""
