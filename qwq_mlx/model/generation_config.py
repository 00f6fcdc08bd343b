"""The sampling values and end ids that a model folder itself asks for: generation_config.json.

Does not: decide what a missing value becomes (generate.options does), or swallow a damaged file, which would lose the
end ids in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import LoadError
from qwq_mlx.files.json_object import read_json_object

__all__ = ["GenerationDefaults", "read_generation_defaults"]

_MAX_BYTES = 1 << 20
_AGAIN = "Copy generation_config.json from the model's source again."


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json says; None where it says nothing.

    temperature is 0 where the file says do_sample false, which is transformers' way to write greedy.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def read_generation_defaults(folder: Path, *, vocab_size: int) -> GenerationDefaults:
    """Read generation_config.json; a folder without it has no defaults.

    Raises SourceError for a file that is no JSON object; LoadError for values that cannot be, or end ids too large.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    values = read_json_object(path, limit_bytes=_MAX_BYTES, advice=_AGAIN)
    if values.get("do_sample") not in (None, True, False):
        raise _fault(path, "do_sample", values["do_sample"], "true or false")
    temperature = _number(values, "temperature", path, low=0.0, high=100.0)
    return GenerationDefaults(
        temperature=0.0 if values.get("do_sample") is False else temperature,
        top_p=_number(values, "top_p", path, low=1e-9, high=1.0),
        top_k=_top_k(values, path),
        min_p=_number(values, "min_p", path, low=0.0, high=1.0),
        repetition_penalty=_number(values, "repetition_penalty", path, low=1e-9, high=100.0),
        eos_token_ids=_eos(values, path, vocab_size),
    )


def _number(values: dict[str, Any], name: str, path: Path, *, low: float, high: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise _fault(path, name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _top_k(values: dict[str, Any], path: Path) -> int | None:
    value = values.get("top_k")
    if value == -1:
        return 0  # how vLLM and others write "no limit"
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise _fault(path, "top_k", value, "a whole number of at least 0, or -1 for no limit")
    return value


def _eos(values: dict[str, Any], path: Path, vocab_size: int) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise _fault(path, "eos_token_id", value, f"ids from 0 to {vocab_size - 1:,}")
    return tuple(ids)


def _fault(path: Path, name: str, value: Any, expected: str) -> LoadError:
    return LoadError(f"{path}: {name} is {value!r}, expected {expected}. {_AGAIN}")
