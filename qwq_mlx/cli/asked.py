"""What the flags of `python -m qwq_mlx.generate` ask for: checked options, and which flags exclude each other.

Does not: parse (the command does), add flags (`flags` does), or read what a flag names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from qwq_mlx.errors import OptionError
from qwq_mlx.options import Limits, Sampling, Thinking

__all__ = ["Asked", "asked_for", "with_flag"]

_FLAGS = {"temperature": "--temp", "banned": "--ban"}
_KINDS = (Sampling, Limits, Thinking)
_OF_ONE_QUESTION = ("prompt", "resume", "save", "save_every", "no_save", "receipt", "json", "answer_now")


class Asked(NamedTuple):
    """The options, checked."""

    sampling: Sampling
    limits: Limits
    thinking: Thinking


def asked_for(given: Mapping[str, Any]) -> Asked:
    """given: what was parsed, by name. Raises OptionError for a wrong value, and for flags that exclude each other."""
    bias = {"logit_bias": dict(_bias_of(text) for text in given["logit_bias"] or ())}
    asked = Asked(
        Sampling(**_given(given, Sampling) | bias), Limits(**_given(given, Limits)), Thinking(**_given(given, Thinking))
    )
    if given["input"] is not None or given["output"] is not None:
        _refuse_beside_input(given)
    elif given["resume"] is not None:
        _refuse_beside_resume(given, asked)
    elif given["answer_now"]:
        raise OptionError("--answer-now asks a saved run for its answer. Give its file with --resume FILE.")
    if given["save_every"] is not None and given["save"] is None:
        raise OptionError("--save-every says how often, but not where. Give --save FILE too.")
    if given["no_save"] and given["save"] is not None:
        raise OptionError("--no-save and --save cannot both be meant. Leave one out.")
    return asked


def with_flag(message: str) -> str:
    """The flag's name instead of the field's, where the message begins with it."""
    name, _, rest = message.partition(" ")
    known = {each.name for kind in _KINDS for each in fields(kind)}
    return f"{_FLAGS.get(name, '--' + name.replace('_', '-'))} {rest}" if name in known else message


def _given(given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Only what was given; everything else keeps the one default that stands in its class."""
    names = {each.name for each in fields(kind)}
    own = {name: value for name, value in given.items() if name in names and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}


def _bias_of(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as error:
        raise OptionError(f"--logit-bias is {text!r}, expected ID=NUMBER, for example 198=-5 or 198=-inf.") from error


def _refuse_beside_resume(given: Mapping[str, Any], asked: Asked) -> None:
    """A saved run has its own question and settings; options that would be ignored are refused."""
    others = Asked(Sampling(), Limits(max_tokens=asked.limits.max_tokens, context=asked.limits.context), Thinking())
    if asked != others or given["prompt"] is not None or given["system_prompt"] is not None:
        raise OptionError(
            "--resume goes on with the settings of the file, so only --model, --max-tokens, --context, --answer-now, "
            "--save, --save-every, --no-save, --force, --receipt, --json and --quiet can be given beside it. "
            "Leave the others out, or start a new run."
        )


def _refuse_beside_input(given: Mapping[str, Any]) -> None:
    """A file of questions needs a file for the answers, and what belongs to one question is refused beside it."""
    if given["input"] is None or given["output"] is None:
        missing = "--input" if given["input"] is None else "--output"
        raise OptionError(f"{missing} is missing. A file of questions takes --input FILE and --output FILE together.")
    for name in _OF_ONE_QUESTION:
        if given[name] not in (None, False):
            raise OptionError(
                f"--{name.replace('_', '-')} belongs to one question and cannot be given beside --input. Leave it out."
            )
