"""A small Qwen2Config; a test exchanges (`dataclasses.replace`) the sizes that it is about."""

from __future__ import annotations

from qwq_mlx.model.architecture import Qwen2Config

__all__ = ["SMALL"]

SMALL = Qwen2Config(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    tie_word_embeddings=False,
    eos_token_ids=(),
)
