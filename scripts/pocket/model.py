"""Qwen2 in PyTorch, for training: grouped-query attention, q/k/v biases, RMSNorm, SwiGLU, untied embeddings.

Parameter names are those of the safetensors files, so exporting renames nothing.

Does not: decode. The package runs the exported weights in MLX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["CONFIG", "PocketModel"]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
    "max_window_layers": 8,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 576,
}
"""QwQ-32B-Preview's keys with the pocket's sizes; export.py adds the token ids."""

_HEAD = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
_KV_WIDTH = CONFIG["num_key_value_heads"] * _HEAD


def _rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (n, head / 2) in float32: rounding the frequencies to bfloat16 would move far tokens."""
    frequencies = CONFIG["rope_theta"] ** (-torch.arange(0, _HEAD, 2, device=positions.device).float() / _HEAD)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention over the whole row."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["hidden_size"]
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, _KV_WIDTH)
        self.v_proj = nn.Linear(width, _KV_WIDTH)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, n, width = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).view(batch, n, -1, _HEAD).transpose(1, 2) for projection in projections)
        q, k = _rotate(q, rope), _rotate(k, rope)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, n, width))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each after an RMSNorm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        self.mlp = MLP()

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Stack(nn.Module):
    """Embedding, layers, final norm (`model.` in the files)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])


class PocketModel(nn.Module):
    """ids (batch, n) to logits (batch, n, vocab)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack()
        self.lm_head = nn.Linear(CONFIG["hidden_size"], CONFIG["vocab_size"], bias=False)
        residual_std = CONFIG["initializer_range"] / (2 * CONFIG["num_hidden_layers"]) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = (
                    residual_std
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else CONFIG["initializer_range"]
                )
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every position, in the parameters' type."""
        rope = _rope(torch.arange(ids.shape[1], device=ids.device))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, rope)
        logits: torch.Tensor = self.lm_head(self.model.norm(x))
        return logits
