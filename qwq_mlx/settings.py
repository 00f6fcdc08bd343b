"""Options as JSON values and back, for traces, receipts and checkpoints.

Does not: fill in defaults; what was resolved is written, and the same comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qwq_mlx.errors import SourceError
from qwq_mlx.options import Limits, Sampling, Thinking

__all__ = ["Settings", "from_json", "to_json"]

Settings = tuple[Sampling, Limits, Thinking]
_KINDS: dict[str, type[Sampling | Limits | Thinking]] = {"sampling": Sampling, "limits": Limits, "thinking": Thinking}


def to_json(*options: Sampling | Limits | Thinking) -> dict[str, dict[str, Any]]:
    """By name; JSON knows no tuples, no integer keys and no infinity."""
    names = {kind: name for name, kind in _KINDS.items()}
    return {names[type(each)]: _values(each) for each in options}


def _values(options: Sampling | Limits | Thinking) -> dict[str, Any]:
    values = asdict(options)
    if isinstance(options, Sampling):
        values["logit_bias"] = {str(token_id): str(value) for token_id, value in options.logit_bias.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_json(settings: Mapping[str, Any], *, where: str) -> Settings:
    """What `to_json` wrote of all three. Raises SourceError where something else stands there."""
    try:
        kept: list[dict[str, Any]] = [
            {field: tuple(value) if isinstance(value, list) else value for field, value in settings[name].items()}
            for name in _KINDS
        ]
        sampling, limits, thinking = kept
        bias = {int(token_id): float(value) for token_id, value in sampling.pop("logit_bias").items()}
        return Sampling(**sampling, logit_bias=bias), Limits(**limits), Thinking(**thinking)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: the settings cannot be read ({error}). The file is damaged or edited.") from error
