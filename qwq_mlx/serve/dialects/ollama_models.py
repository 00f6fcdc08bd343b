"""What Ollama's clients ask about models: which there are, what one can do, and what is not done here.

Does not: pull, push, create, copy or delete; those get status 501 with a sentence.
"""

from __future__ import annotations

from typing import Any

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import Fields
from qwq_mlx.serve.dialects.fields import check_model
from qwq_mlx.serve.dialects.ollama import now_text
from qwq_mlx.serve.model_card import ModelCard

__all__ = ["NOT_DONE", "VERSION", "not_done", "processes", "show", "tags"]

VERSION = "0.13.3"
"""Whose interface this is: clients look at it to know what they may ask."""
NOT_DONE = ("pull", "push", "create", "copy", "delete", "embed", "embeddings")

_FOREVER = "2318-01-01T00:00:00Z"


def not_done(path: str) -> ApiError:
    """The answer to what would change models."""
    return ApiError(
        501,
        f"{path} is not implemented: this server has the one model that it was started with.",
        code="not_implemented",
    )


def tags(card: ModelCard) -> dict[str, Any]:
    """The list of models."""
    return {"models": [{**_named(card), "modified_at": now_text(card.modified_s)}]}


def processes(card: ModelCard) -> dict[str, Any]:
    """The models in memory."""
    own = {"expires_at": _FOREVER, "size_vram": card.weights_bytes, "context_length": card.context}
    return {"models": [{**_named(card), **own}]}


def show(body: dict[str, Any], card: ModelCard) -> dict[str, Any]:
    """All about the model. Raises ApiError for another one."""
    fields = Fields(body)
    named = fields.text("model") or fields.text("name")
    if not named:
        raise fields.wrong("model", f"the name of the model, {card.name!r}")
    fields.ignore("verbose", "name")
    fields.refuse_others({"system": ("",), "template": ("",), "options": ({},)})
    check_model(named, card.name)
    info = {
        "general.architecture": "qwen2",
        "general.basename": card.name,
        "general.parameter_count": card.n_parameters,
        "qwen2.context_length": card.context,
        "qwen2.embedding_length": card.hidden_size,
        "qwen2.block_count": card.n_layers,
        "qwen2.attention.head_count": card.n_heads,
        "qwen2.attention.head_count_kv": card.n_kv_heads,
        "qwen2.vocab_size": card.vocab_size,
    }
    return {
        "modelfile": f"FROM {card.name}",
        "parameters": f"num_ctx {card.context}",
        "template": card.template,
        "details": _details(card),
        "model_info": info,
        "capabilities": ["completion", "thinking"],
        "modified_at": now_text(card.modified_s),
    }


def _named(card: ModelCard) -> dict[str, Any]:
    name = f"{card.name}:latest"
    return {"name": name, "model": name, "size": card.weights_bytes, "digest": card.digest, "details": _details(card)}


def _details(card: ModelCard) -> dict[str, Any]:
    n = card.n_parameters
    size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
    return {
        "parent_model": "",
        "format": "mlx",
        "family": "qwen2",
        "families": ["qwen2"],
        "parameter_size": size,
        "quantization_level": card.weights,
    }
