"""Rotary positions of a Qwen2 config.json: plain ones, and YaRN, which stretches them over a longer context.

Qwen's model cards advise YaRN beyond 32,768 tokens: `"rope_scaling": {"type": "yarn", "factor": 4.0,
"original_max_position_embeddings": 32768}`. mlx_lm's YarnRoPE has transformers' frequencies and attention factor for
these keys (a test compares them). It ignores others that transformers knows, so values of them that change anything are
refused here.

Source: YaRN, https://arxiv.org/abs/2309.00071; transformers.modeling_rope_utils.

Does not: compute positions (mlx_lm does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwq_mlx.errors import LoadError

__all__ = ["Yarn", "rope_parameters"]

_AGAIN = "Take config.json from the source again."
_MAX_CONTEXT = 16_777_216
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # as suggested in the paper
_KINDS = "expected type 'default', 'linear' by 1, or 'yarn'"
# Of YaRN: what is read, and what transformers reads besides, with the values that change nothing.
_READ = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (None, True),
    "partial_rotary_factor": (None, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN's settings. factor: by which the context grows. original_context: positions that were trained.

    beta_fast, beta_slow: rotations within it above which a frequency stays, and below which it is divided by factor.
    """

    factor: float
    original_context: int
    beta_fast: float = _BETA_FAST
    beta_slow: float = _BETA_SLOW

    @property
    def context(self) -> int:
        """Positions there are with it."""
        return int(self.factor * self.original_context)

    def as_mlx_lm(self) -> dict[str, Any]:
        """As mlx_lm's models take it."""
        return {
            "type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_context,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }


def rope_parameters(config: Mapping[str, Any], *, where: str) -> tuple[Any, Yarn | None]:
    """rope_theta as it stands in a config.json (None where it does not), and YaRN's settings.

    where: the file's path, for messages. transformers 5 writes rope_parameters in place of rope_theta and rope_scaling.
    Raises LoadError for settings that contradict each other, and for those that are not built.
    """
    theta, yarn = config.get("rope_theta"), None
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name)
        if not parameters:
            continue
        kind = _kind(parameters) if isinstance(parameters, Mapping) else None
        if not isinstance(parameters, Mapping) or kind not in ("default", "yarn"):
            raise LoadError(
                f"{where}: {name} is {parameters!r:.200}, {_KINDS}. Other scaled rotary positions are not supported; "
                "remove the entry to use the model within its own context."
            )
        its_theta = parameters.get("rope_theta", theta)
        if theta is not None and its_theta != theta:
            raise LoadError(f"{where}: rope_theta is {theta!r}, but {name} says {its_theta!r}. {_AGAIN}")
        theta = its_theta
        if kind == "yarn":
            yarn = _yarn(parameters, config.get("max_position_embeddings"), f"{where}: {name}")
    return theta, yarn


def _kind(parameters: Mapping[str, Any]) -> object:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return "default" if kind == "linear" and parameters.get("factor") == 1 else kind


def _yarn(parameters: Mapping[str, Any], max_position_embeddings: object, where: str) -> Yarn:
    for name, value in parameters.items():
        if name not in _READ and value not in _NEUTRAL.get(name, ()):
            raise LoadError(
                f"{where}: {name} is {value!r:.80}, which mlx_lm's YaRN does not have. Remove it if the model was "
                "trained without, or use transformers."
            )
    factor = _number(parameters, "factor", where, low=1.0, high=1024.0)
    original: Any = parameters.get("original_max_position_embeddings", max_position_embeddings)
    if type(original) is not int or not 1 <= original * factor <= _MAX_CONTEXT:
        raise LoadError(
            f"{where}: original_max_position_embeddings is {original!r:.80}, expected a whole number that makes at "
            f"most {_MAX_CONTEXT:,} with the factor {factor:g}. {_AGAIN}"
        )
    return Yarn(
        factor=factor,
        original_context=original,
        beta_fast=_number(parameters, "beta_fast", where, low=1e-3, high=1e4, default=_BETA_FAST),
        beta_slow=_number(parameters, "beta_slow", where, low=1e-3, high=1e4, default=_BETA_SLOW),
    )


def _number(
    parameters: Mapping[str, Any], name: str, where: str, *, low: float, high: float, default: float | None = None
) -> float:
    value: Any = parameters.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise LoadError(f"{where}: {name} is {value!r:.80}, expected a number from {low:g} to {high:g}. {_AGAIN}")
    return float(value)
