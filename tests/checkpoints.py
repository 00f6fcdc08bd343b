"""Tiny random checkpoints in exactly the on-disk layout of QwQ-32B-Preview, made with numpy and struct alone.

The sizes differ from each other (hidden 128, MLP 192, keys 64, vocabulary 320 with 22 padding rows), so a swapped axis
cannot pass. Nothing of the package writes these files: they are the outside view that the package is tested against.

Does not: make weights that mean anything, or import the package, MLX or torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SYSTEM_PROMPT = "You are a tiny test model."
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each word becomes one token; its merges are learnt from left to right. Ġ is the byte-level space.
_WORDS = ("Ġthe", "Ġand", "in", "er", "Ġis", "Ġso", "wait", "ĠWait", "Ġanswer", "boxed", "Final", "ĠAnswer", "ĠĠ", "**")

Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors dtype, shape, little-endian bytes


def write_tiny_checkpoint(
    folder: Path,
    *,
    n_layers: int = 2,
    n_shards: int = 2,
    tie: bool = False,
    seed: int = 0,
    dtype: str = "BF16",
    hidden_size: int = 128,
    intermediate_size: int = 192,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    vocab_size: int = 320,
    max_position_embeddings: int = 512,
) -> Path:
    """Write config, generation config, shards, index, tokenizer and its config; returns the folder.

    dtype: "BF16", "F16" or "F32". The same arguments give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_json()
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    n_ids = 1 + max(ids.values())
    if vocab_size < n_ids:
        raise ValueError(f"vocab_size {vocab_size} is below the tokenizer's {n_ids} ids")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": n_layers,
        "model_type": "qwen2",
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": n_kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": max_position_embeddings,
        "tie_word_embeddings": tie,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(ids, max_position_embeddings))
    shapes = _shapes(n_layers, hidden_size, intermediate_size, hidden_size // n_heads * n_kv_heads, vocab_size, tie)
    _write_shards(folder, _random_tensors(shapes, seed, dtype, n_ids), n_shards)
    return folder


def write_json(path: Path, value: object) -> None:
    """Write one JSON file as the Hub's are: indented, UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as bytes: length, JSON header padded to 8, data in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + len(data)]}
        start += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def encode_floats(values: np.ndarray, dtype: str) -> bytes:
    """float32 values as little-endian BF16 (rounded to nearest even), F16 or F32 bytes."""
    values = np.ascontiguousarray(values, dtype="<f4")
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    bits = values.view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def tokenizer_json() -> dict:
    """A byte-level BPE tokenizer as Qwen2's: digits apart, ChatML special tokens, 256 bytes and a few words."""
    vocabulary = {char: index for index, char in enumerate(_byte_characters())}
    merges = []
    for word in _WORDS:
        joined = word[0]
        for char in word[1:]:
            if joined + char not in vocabulary:
                merges.append([joined, char])
                vocabulary[joined + char] = len(vocabulary)
            joined += char
    added = [
        {
            "id": len(vocabulary) + index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, content in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of Qwen2's ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    n_others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(0x100 + index) for index in range(n_others)]


def _tokenizer_config(ids: Mapping[str, int], max_position_embeddings: int) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): {"content": content, **flags} for content, token_id in ids.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _shapes(n_layers: int, hidden: int, mlp: int, keys: int, vocab: int, tie: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, mlp)
        shapes[prefix + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("k", keys), ("q", hidden), ("v", keys)):
            shapes[prefix + f"self_attn.{name}_proj.bias"] = (rows,)
            shapes[prefix + f"self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not tie:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str, n_ids: int) -> dict[str, Tensor]:
    """Weights of a scale that keeps activations near 1 and logits well apart (greedy ids agree between programs)."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values *= 0.1
        else:
            values *= shape[1] ** -0.5
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            values[n_ids:] *= 0.02  # rows beyond the tokenizer's ids, as padded vocabularies have them: never sampled
        tensors[name] = (dtype, shape, encode_floats(values, dtype))
    return tensors


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], n_shards: int) -> None:
    """Cut at equal bytes, every shard with at least one tensor, and write the index."""
    if not 1 <= n_shards <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot fill {n_shards} shards")
    total_bytes = sum(len(data) for _, _, data in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    done_bytes = 0
    for index, (name, tensor) in enumerate(tensors.items()):
        is_due = done_bytes >= total_bytes * len(shards) / n_shards or len(tensors) - index == n_shards - len(shards)
        if shards[-1] and len(shards) < n_shards and is_due:
            shards.append({})
        shards[-1][name] = tensor
        done_bytes += len(tensor[2])
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(shard, {"format": "pt"}))
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
