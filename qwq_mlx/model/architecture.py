"""Qwen2 as numbers: a config.json becomes checked fields, and the fields become every tensor's name and shape.

The converter and the loader both compare what is on disk with this table before anything is allocated, so a config that
asks for ten million layers, or a shard with a tensor too many, is refused by name in milliseconds.

Does not: hold weights, run the model (mlx_lm's Qwen2 does), or read files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwq_mlx.errors import LoadError
from qwq_mlx.model.rope import Yarn, rope_parameters

__all__ = ["Qwen2Config", "check_tensors", "tensor_shapes"]

# Far above any Qwen2 (72B: hidden 8192, MLP 29568, 80 layers, vocabulary 152,064), far below what exhausts a machine.
_LIMITS = {
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "vocab_size": 4_194_304,
    "max_position_embeddings": 16_777_216,
}
# Published ones: 1e-5 and 1e-6; 1e4 to 4e9 (contexts of a million). Beyond these only damage has been.
_RANGES = {"rms_norm_eps": (1e-12, 1e-2), "rope_theta": (1e2, 1e12)}
_MAX_NAMES = 20  # names listed in one message; the rest is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config:
    """The fields of a Qwen2 config.json that decide shapes and arithmetic, all checked.

    max_position_embeddings: positions there are, with YaRN where config.json asks for it.
    eos_token_ids: ids that end a text, from config.json (generation_config.json may add more).
    yarn: how rotary positions are stretched; None leaves them as they are.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    yarn: Yarn | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def output_matrix(self) -> str:
        """Name of the matrix that makes logits, without ".weight"."""
        return "model.embed_tokens" if self.tie_word_embeddings else "lm_head"

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, where: str) -> Qwen2Config:
        """Check a parsed config.json and keep what matters.

        where: the file's path, for messages.
        Raises LoadError naming the field, what was found and what a Qwen2 model needs.
        """
        if config.get("model_type") != "qwen2":
            raise LoadError(
                f"{where}: model_type is {config.get('model_type')!r}, expected 'qwen2'. "
                "qwq_mlx converts and runs Qwen2 (QwQ-32B-Preview, QwQ-32B, Qwen2.5); use mlx-lm for others."
            )
        _refuse_unsupported(config, where)
        sizes = {name: _whole_number(config, name, where, limit) for name, limit in _LIMITS.items()}
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        for name, value, divisor in (
            ("hidden_size", sizes["hidden_size"], heads),
            ("num_attention_heads", heads, kv_heads),
        ):
            if value % divisor:
                other = "num_attention_heads" if name == "hidden_size" else "num_key_value_heads"
                raise LoadError(
                    f"{where}: {name} {value} is not a multiple of {other} {divisor}. "
                    "Take config.json from the source again."
                )
        if sizes["hidden_size"] // heads % 2:
            raise LoadError(
                f"{where}: head width {sizes['hidden_size'] // heads} is odd, rotary embeddings need an even one. "
                "Take config.json from the source again."
            )
        theta, yarn = rope_parameters(config, where=where)
        if yarn is not None:
            sizes["max_position_embeddings"] = yarn.context
        return cls(
            **sizes,
            rms_norm_eps=_number(config, "rms_norm_eps", where),
            rope_theta=_number({} if theta is None else {"rope_theta": theta}, "rope_theta", where),
            yarn=yarn,
            tie_word_embeddings=_flag(config, "tie_word_embeddings", where),
            eos_token_ids=_eos(config, where, sizes["vocab_size"]),
        )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    """Options that change the arithmetic and that this package would otherwise ignore in silence."""
    if config.get("use_sliding_window"):
        raise LoadError(
            f"{where}: use_sliding_window is true, expected false. Sliding-window attention is not supported yet."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise LoadError(f"{where}: hidden_act is {activation!r}, expected 'silu', the only one Qwen2 has.")
    if config.get("head_dim") is not None and config.get("num_attention_heads"):
        expected = _whole_number(config, "hidden_size", where, _LIMITS["hidden_size"]) // _whole_number(
            config, "num_attention_heads", where, _LIMITS["num_attention_heads"]
        )
        if config["head_dim"] != expected:
            raise LoadError(
                f"{where}: head_dim is {config['head_dim']!r}, expected hidden_size / num_attention_heads = {expected}."
            )


def _whole_number(config: Mapping[str, Any], name: str, where: str, limit: int) -> int:
    if name not in config:
        raise LoadError(f"{where}: {name} is missing. Take config.json from the source again.")
    value = config[name]
    if type(value) is not int or not 1 <= value <= limit:
        raise LoadError(
            f"{where}: {name} is {value!r}, expected a whole number from 1 to {limit:,}. "
            "Take config.json from the source again."
        )
    return value


def _number(config: Mapping[str, Any], name: str, where: str) -> float:
    low, high = _RANGES[name]
    if name not in config:
        raise LoadError(f"{where}: {name} is missing. Take config.json from the source again.")
    value = config[name]
    if type(value) not in (int, float) or not low <= value <= high:
        raise LoadError(
            f"{where}: {name} is {value!r}, expected a number from {low:g} to {high:g}. "
            "Take config.json from the source again."
        )
    return float(value)


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise LoadError(
            f"{where}: {name} is {value!r}, expected true or false. Take config.json from the source again."
        )
    return value


def _eos(config: Mapping[str, Any], where: str, vocab_size: int) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise LoadError(
                f"{where}: eos_token_id is {value!r}, expected ids from 0 to {vocab_size - 1:,}. "
                "Take config.json from the source again."
            )
    return tuple(ids)


def tensor_shapes(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by its name in the checkpoint, with its shape, in the order of the layers.

    Source: the state dict of transformers' Qwen2ForCausalLM (a test compares the two).
    """
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for index in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Compare the tensors of a folder with the table; every difference is named.

    Raises LoadError listing what is missing, what is extra and what has another shape.
    """
    missing = sorted(expected.keys() - actual.keys())
    extra = sorted(actual.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & actual.keys() if expected[name] != actual[name])
    if not (missing or extra or other):
        return
    lines = [f"{where}: the tensors are not those that config.json describes."]
    lines += _listed("missing", missing)
    lines += _listed("unknown", extra)
    lines += _listed("of another shape", [f"{name} {actual[name]}, expected {expected[name]}" for name in other])
    lines.append("Config and shards must come from the same commit of the same model; fetch both again.")
    raise LoadError("\n".join(lines))


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    shown = ", ".join(names[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return [f"{len(names):,} {what}: {shown}{more}."]
