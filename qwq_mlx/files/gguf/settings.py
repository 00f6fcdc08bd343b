"""The metadata of a Qwen2 GGUF as the config.json and generation_config.json that a checkpoint of the Hub has.

What is no language model of this architecture (an adapter, a vision projector, another architecture) is refused by
name.

Does not: check the numbers (`model.architecture` does), or look at tensors beyond the shape of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError
from qwq_mlx.facts import QWQ_32B, QWQ_32B_PREVIEW
from qwq_mlx.files.gguf.scan import Value

__all__ = ["check_kind", "end_ids", "make_config", "make_generation_config", "model_name"]

_ARCHITECTURE = "qwen2"
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
_END_TEXTS = ("<|im_end|>", "<|endoftext|>")  # Qwen2 ends a turn with one and a document with the other
_SAMPLING = {  # general.sampling.KEY of llama.cpp since 2025
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_OPEN_THINKING = "<think>"
_MAX_NAME = 80


def check_kind(metadata: Mapping[str, Value], path: Path) -> None:
    """Refuse what holds no Qwen2 language model. Raises SourceError."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in metadata:
        raise SourceError(
            f"{path}: is a LoRA adapter, expected a whole model. Merge it into its base model first (llama-export-lora "
            "of llama.cpp does), or give the base model's GGUF."
        )
    if kind == "mmproj" or architecture == "clip":
        raise SourceError(
            f"{path}: is a vision projector (mmproj), expected a language model. Give the other GGUF file of the same "
            "folder."
        )
    if kind != "model":
        raise SourceError(f"{path}: general.type is {kind!r:.60}, expected 'model'. Give the GGUF of a model.")
    if architecture != _ARCHITECTURE:
        raise SourceError(
            f"{path}: general.architecture is {architecture!r:.60}, expected {_ARCHITECTURE!r}. qwq_mlx converts and "
            "runs Qwen2 (QwQ-32B-Preview, QwQ-32B, Qwen2.5); use llama.cpp for others."
        )


def make_config(
    metadata: Mapping[str, Value], path: Path, *, vocab_size: int, is_tied: bool, end_ids: Sequence[int]
) -> dict[str, Any]:
    """config.json. vocab_size: rows of the embedding. is_tied: there is no output matrix. Raises SourceError.

    Numbers are not checked here. llama.cpp stores reals in float32, which are written with the 7 digits they have.
    """

    def of(key: str) -> Value:
        if (value := metadata.get(f"{_ARCHITECTURE}.{key}")) is None:
            raise SourceError(f"{path}: has no {_ARCHITECTURE}.{key}, expected that of a Qwen2 model. Fetch it again.")
        return value

    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        **{name: of(key) for name, key in _SIZES.items()},
        "rms_norm_eps": _short(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(metadata.get(f"{_ARCHITECTURE}.rope.freq_base", 10_000.0)),
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids[0] if end_ids else None,
    }
    width = metadata.get(f"{_ARCHITECTURE}.attention.key_length", metadata.get(f"{_ARCHITECTURE}.rope.dimension_count"))
    if width is not None:
        config["head_dim"] = width
    if metadata.get(f"{_ARCHITECTURE}.attention.causal", True) is not True:
        raise SourceError(f"{path}: attention.causal is false, as of an embedding model, which does not generate.")
    return config | _rope_scaling(metadata)


def _rope_scaling(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """rope_scaling as config.json has it; whether it can be computed is `model.rope`'s to say."""
    prefix = f"{_ARCHITECTURE}.rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"type": kind, "factor": _short(metadata.get(f"{prefix}factor"))}
    names = {"original_context_length": "original_max_position_embeddings", "attn_factor": "attention_factor"}
    for key, name in names.items():
        if (value := metadata.get(prefix + key)) is not None:
            scaling[name] = _short(value)
    return {"rope_scaling": scaling}


def make_generation_config(metadata: Mapping[str, Value], end_ids: Sequence[int], name: str) -> dict[str, Any]:
    """generation_config.json: the ends of a text, and the sampling that the file or the model's publisher asks for."""
    config: dict[str, Any] = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": list(end_ids),
    }
    asked = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    sampling: dict[str, Any] = {name: _short(value) for name, value in asked.items() if value is not None}
    if not sampling and name == QWQ_32B_PREVIEW.name:
        sampling = dict(QWQ_32B_PREVIEW.sampling)
    return config | ({"do_sample": True} if sampling else {}) | sampling


def end_ids(metadata: Mapping[str, Value], tokens: Sequence[str]) -> list[int]:
    """Ids that end a text: the one the file names, then Qwen2's two by their texts, without repeats."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    named = [each for key in keys if type(each := metadata.get(key)) is int]
    return list(dict.fromkeys([*named, *(tokens.index(text) for text in _END_TEXTS if text in tokens)]))


def model_name(metadata: Mapping[str, Value], tokens: Sequence[str], config: Mapping[str, Any]) -> str:
    """The model's published name where it can be told, else the file's own name for it.

    QwQ-32B and QwQ-32B-Preview have one shape, and both are called qwq. The Preview has no token for thinking.
    """
    labels = [str(metadata.get(f"general.{key}", "")) for key in ("name", "basename", "finetune")]
    shape = ("hidden_size", "num_hidden_layers", "vocab_size")
    if "qwq" in " ".join(labels).lower() and all(config[key] == getattr(QWQ_32B, key) for key in shape):
        return QWQ_32B.name if _OPEN_THINKING in tokens else QWQ_32B_PREVIEW.name
    label = "".join(each if each.isprintable() else " " for each in labels[0] or labels[1])  # shown in a terminal
    return label[:_MAX_NAME].strip() or "a Qwen2 model without a name"


def _short(value: Value | None) -> Value | None:
    """A float32 as the shortest decimal that it was made from: 9.999999974752427e-07 is 1e-06."""
    return float(f"{value:.7g}") if type(value) is float else value
