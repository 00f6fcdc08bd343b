"""Models as data: what is known of each model this package is made for, with its source.

Shapes are those of the published config.json; everything that can be computed from a config (tensor names, sizes) is
computed in `qwq_mlx.model.architecture`, so that no number stands twice.

Does not: hold code, read files, or decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MODELS", "POCKET", "QWQ_32B", "QWQ_32B_PREVIEW", "ModelFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One published model.

    repository: the Hub's name, or None for a model that ships with the package.
    source_bytes: of all tensors in the checkpoint (bfloat16).
    profile: name of the reasoning profile (`qwq_mlx.reasoning.profile`).
    system_prompt: what the chat template writes when the conversation has no system message; None if it writes nothing.
    sampling: of the published generation_config.json, for a copy of the model that comes without that file.
    """

    name: str
    repository: str | None
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    source_bytes: int | None
    profile: str
    system_prompt: str | None
    source: str
    sampling: Mapping[str, float] = field(default_factory=dict)


_QWQ_PREVIEW_SYSTEM = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)

QWQ_32B_PREVIEW = ModelFacts(
    name="QwQ-32B-Preview",
    repository="Qwen/QwQ-32B-Preview",
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152_064,
    source_bytes=65_527_752_704,
    profile="qwq-preview",
    system_prompt=_QWQ_PREVIEW_SYSTEM,
    source="config.json and chat template of the repository; 17 shards of 4e9 bytes; bytes computed from the shapes",
    sampling={"repetition_penalty": 1.0, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
)

QWQ_32B = ModelFacts(
    name="QwQ-32B",
    repository="Qwen/QwQ-32B",
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152_064,
    source_bytes=65_527_752_704,
    profile="qwq-tagged",
    system_prompt=None,
    source="config.json of the repository; its template opens <think> in the generation prompt",
)

POCKET = ModelFacts(
    name="QwQ-Pocket",
    repository=None,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=576,
    source_bytes=None,
    profile="qwq-preview",
    system_prompt=_QWQ_PREVIEW_SYSTEM,
    source="scripts/train_pocket.py of this repository",
)

MODELS = (QWQ_32B_PREVIEW, QWQ_32B, POCKET)
