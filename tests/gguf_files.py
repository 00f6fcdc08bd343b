"""Small GGUF files, written with struct alone from a checkpoint's folder; the outside view of the package's reader.

Blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 are the gguf package's; those of the K types, which it cannot write, are random
bytes with small scales.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import load_file

Entry = tuple[str, tuple[int, ...], bytes]  # type, shape (rows first), bytes

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text(value: str | bytes) -> bytes:
    """A text as GGUF has it: its length and its bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def encoded(value: Any) -> bytes:
    """Type and value: texts, truth values, whole numbers (u32, or (type, number)), reals (float32) and lists."""
    if isinstance(value, tuple):
        return struct.pack("<I", value[0]) + struct.pack(f"<{_CODES[value[0]]}", value[1])
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", STRING) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, I32, len(value), *value)


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, Entry], *, alignment: int = 32, version: int = 3
) -> bytes:
    """A whole file."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [text(key) + encoded(value) for key, value in metadata.items()]
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(text(name) + dimensions + struct.pack("<IQ", GGMLQuantizationType[kind], offset))
        offset += -(-len(data) // alignment) * alignment
    head = b"".join(parts)
    data = [each + bytes(-len(each) % alignment) for _, _, each in tensors.values()]
    return head + bytes(-len(head) % alignment) + b"".join(data)


def metadata_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a checkpoint. changes: keys with _ for ., None drops one."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    kinds = [5] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = token, 1
    for each in tokenizer["added_tokens"]:
        is_control = each["special"] or re.fullmatch(r"<\|.*\|>", each["content"])  # as the converter decides it
        tokens[each["id"]], kinds[each["id"]] = each["content"], 3 if is_control else 4
    ids = {text: index for index, text in enumerate(tokens)}
    merges = [each if isinstance(each, str) else " ".join(each) for each in tokenizer["model"]["merges"]]
    metadata = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "A Small Model",
        "qwen2.block_count": config["num_hidden_layers"],
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.rope.freq_base": float(config["rope_theta"]),
        "qwen2.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings["chat_template"],
        **changes,
    }
    return {key: value for key, value in metadata.items() if value is not None}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under GGUF's names, float32."""
    weights: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, array in _loaded(path).items():
            stem, kind = name.rsplit(".", 1)
            if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
                weights[f"blk.{match[1]}.{_NAMES[match[2]]}.{kind}"] = array
            else:
                weights[f"{_NAMES[stem]}.{kind}"] = array
    return weights


def _loaded(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    length = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + length])
    if all(each["dtype"] != "BF16" for name, each in header.items() if name != "__metadata__"):
        return {name: array.astype(np.float32) for name, array in load_file(path).items()}
    arrays = {}
    for name, each in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in each["data_offsets"])
            bits = np.frombuffer(raw[start:end], "<u2").astype(np.uint32) << 16
            arrays[name] = bits.view(np.float32).reshape(each["shape"])
    return arrays


def entry_of(weights: np.ndarray, kind: str) -> Entry:
    """A tensor in a type that the gguf package can write."""
    return kind, weights.shape, quantize(weights, GGMLQuantizationType[kind]).tobytes()


def random_blocks(kind: str, shape: tuple[int, int], seed: int = 0, *, size: float = 0.01) -> np.ndarray:
    """(rows, bytes of a row): random bytes, but small normal numbers where a block has float16 scales."""
    n_weights, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows * columns // n_weights, n_bytes), dtype=np.uint8)
    for at in _SCALES[kind](n_bytes):
        blocks[:, at : at + 2] = rng.normal(0, size, len(blocks)).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


_SCALES: Mapping[str, Callable[[int], Iterable[int]]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), lambda n: (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), lambda n: (0, 2)),
    "Q2_K": lambda n: (n - 4, n - 2),
    **dict.fromkeys(("Q3_K", "Q6_K"), lambda n: (n - 2,)),
}


def write_gguf(folder: Path, path: Path, kind_of: Callable[[str], str] | str = "BF16", **changes: Any) -> Path:
    """A checkpoint as a GGUF. kind_of: the type of the matrix of a name; vectors are float32. Returns the path."""
    tensors: dict[str, Entry] = {}
    for index, (name, weights) in enumerate(weights_of(folder).items()):
        kind = "F32" if weights.ndim == 1 else kind_of if isinstance(kind_of, str) else kind_of(name)
        if kind.endswith("_K") or kind.startswith("IQ"):
            tensors[name] = kind, weights.shape, random_blocks(kind, weights.shape, index, size=2e-4).tobytes()
        else:
            tensors[name] = entry_of(weights, kind)
    path.write_bytes(gguf_bytes(metadata_of(folder, **changes), tensors))
    return path
