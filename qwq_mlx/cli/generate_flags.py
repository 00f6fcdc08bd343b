"""Flags that fill Sampling, Limits and Thinking: their help with the defaults of those classes, and what was parsed as
checked options, flags that exclude each other refused.

Does not: parse (the command does), or check a value (the classes do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from qwq_mlx.cli.hosts import BACKENDS
from qwq_mlx.errors import OptionError
from qwq_mlx.options import LOOP_ACTIONS, MAX_SAMPLES, Limits, Sampling, Thinking

__all__ = [
    "CHAT_TEMPLATE",
    "FOLLOW_LINKS",
    "RunOptions",
    "add_limits",
    "add_loading",
    "add_sampling",
    "bits",
    "checked_options",
    "run_options",
]

CHAT_TEMPLATE = "file with the chat template (jinja) that writes the prompts"
FOLLOW_LINKS = "read shards that links lead to outside of the folder, on another disk for example"
_NO_VERIFY = (
    "do not hash the weights of a conversion in the background (by default they are compared with its manifest, and "
    "the command ends with an error if a byte is wrong; at its end it waits up to 10 s for that)"
)
"""Help of --chat-template, --follow-links and --no-verify; other commands have some of these flags alone."""

_OF_ONE_QUESTION = ("prompt", "resume", "save", "save_every", "no_save", "receipt", "json", "answer_now")


def add_limits(add: Callable[..., Any]) -> None:
    """Options of Limits and Thinking. add: a parser's add_argument."""
    answer_tokens, on_loop = _default(Thinking, "answer_tokens"), _default(Thinking, "on_loop")
    add(
        "--max-tokens", type=int, metavar="N", help="maximum number of output tokens (default: what the context leaves)"
    )
    add("--context", type=int, metavar="N", help="context length in tokens, prompt included (default: the model's own)")
    add("--kv-bits", type=bits, choices=(8, 4, "auto"), help="bits of a quantized KV cache (default: off)")
    add(
        "--prefill-step",
        type=int,
        metavar="N",
        help=f"prompt tokens per prefill pass (default: {_default(Limits, 'prefill_step')})",
    )
    add("--stop", action="append", metavar="TEXT", help="stop at this text, which is left out; repeatable")
    add(
        "--think-tokens",
        type=int,
        metavar="N",
        help="thinking budget in tokens, after which the answer is asked for (default: none)",
    )
    add(
        "--answer-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of tokens of that answer (default: {answer_tokens})",
    )
    add("--on-loop", choices=LOOP_ACTIONS, help=f"what to do when the output loops (default: {on_loop})")


def add_sampling(add: Callable[..., Any]) -> None:
    """Options of Sampling, bans and the language guard. add: a parser's add_argument."""
    multiplier, base = _default(Sampling, "dry_multiplier"), _default(Sampling, "dry_base")
    length, order = _default(Sampling, "dry_allowed_length"), _default(Sampling, "order")
    add("--temp", type=float, metavar="T", dest="temperature", help="temperature; 0 is greedy")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling: keep the most likely tokens up to probability P; 1 is off",
    )
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 is off")
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens below P times the probability of the most likely one; 0 is off",
    )
    add("--seed", type=int, metavar="N", help="random seed (default: random, printed)")
    add("--repetition-penalty", type=float, metavar="X", help="penalise tokens of prompt and output; 1 is off")
    add("--presence-penalty", type=float, metavar="X", help="penalise tokens of the output; 0 is off")
    add("--frequency-penalty", type=float, metavar="X", help="penalise tokens by their count in the output; 0 is off")
    add(
        "--dry-multiplier",
        type=float,
        metavar="X",
        help=f"DRY: penalise tokens that would extend a repeated sequence; 0 is off (default: {multiplier})",
    )
    add("--dry-base", type=float, metavar="X", help=f"DRY: growth of the penalty per repeated token (default: {base})")
    add(
        "--dry-allowed-length", type=int, metavar="N", help=f"DRY: longest repeat without a penalty (default: {length})"
    )
    add(
        "--logit-bias",
        action="append",
        metavar="ID=X",
        help="add X to the logit of a token id; -inf bans it; repeatable",
    )
    add("--ban", action="append", metavar="TEXT", dest="banned", help="text that is never written; repeatable")
    add(
        "--language-guard",
        action="store_true",
        default=None,
        help="no letters of scripts that the question does not use, except in quotations, formulas and brackets",
    )
    add("--order", choices=("hf", "mlx-lm"), help=f"order of the sampling steps (default: {order})")


def _default(options: type, name: str) -> Any:
    return next(each.default for each in fields(options) if each.name == name)


def add_loading(add: Callable[..., Any]) -> None:
    """Flags of how a model is loaded and checked."""
    add("--force", action="store_true", help="run even if the memory plan says that it does not fit")
    add("--no-verify", action="store_true", help=_NO_VERIFY)
    add("--chat-template", metavar="FILE", help=CHAT_TEMPLATE + " (default: the model's)")
    add("--follow-links", action="store_true", help=FOLLOW_LINKS)
    add(
        "--draft",
        metavar="ngram|DIR|auto|off",
        help="guess tokens that a pass then checks, which changes none of them: from the texts so far (ngram), also by "
        "a small model of the same tokenizer (its folder), or what $QWQ_MLX_DRAFT names (auto) (default: off)",
    )
    add(
        "--draft-length",
        type=int,
        metavar="N",
        help="with --draft: guess N tokens whatever a pass costs (default: as many as are measured to pay here, "
        "often none)",
    )
    add_hosts(add)


def add_hosts(add: Callable[..., Any]) -> None:
    """Flags of several processes, here or on other machines, that hold the model together."""
    add(
        "--hosts",
        metavar="localhost,HOST",
        help="machines that hold the model together: this one first, the others as ssh calls them; "
        "HOST*N for N processes there (docs/machines.md)",
    )
    add("--hostfile", metavar="FILE", help="the same from a file that mlx.distributed_config wrote")
    add(
        "--hosts-split",
        choices=("tensor", "pipeline"),
        help="who holds what: a part of every layer each, or layers by its memory (default: tensor where each then "
        "reaches the context, else what reaches the longer one)",
    )
    add("--hosts-backend", choices=BACKENDS, help="what they speak through (default: the hostfile's, or ring)")
    add("--hosts-port", type=int, metavar="N", help="first of the ports that they listen at (default: free ones)")


def bits(text: str) -> int | str:
    """The type of --kv-bits: a number, or "auto"."""
    return int(text) if text.isdecimal() else text


class RunOptions(NamedTuple):
    """The options, checked."""

    sampling: Sampling
    limits: Limits
    thinking: Thinking


def run_options(options: Mapping[str, Any]) -> RunOptions:
    """options: what was parsed. Raises OptionError for a wrong value, and for flags that exclude each other."""
    asked = checked_options(options)
    if options["samples"] is not None:
        _check_samples(options)
    elif options["input"] is not None or options["output"] is not None:
        _refuse_beside_input(options)
    elif options["resume"] is not None:
        _refuse_beside_resume(options, asked)
    elif options["answer_now"]:
        raise OptionError("--answer-now asks a saved run for its answer. Give its file with --resume FILE.")
    if options["samples"] is None and (options["all_samples"] or options["confidence"] is not None):
        raise OptionError("--all-samples and --confidence need --samples N.")
    if options["width"] is not None and options["input"] is None and options["samples"] is None:
        raise OptionError("--width needs --input FILE or --samples N.")
    if options["reproducible"] and options["input"] is None and options["samples"] is None:
        raise OptionError("--reproducible needs --input FILE or --samples N; a single run is reproducible by itself.")
    if options["save_every"] is not None and options["save"] is None:
        raise OptionError("--save-every needs --save FILE.")
    if options["no_save"] and options["save"] is not None:
        raise OptionError("--save and --no-save are mutually exclusive.")
    return asked


def checked_options(options: Mapping[str, Any]) -> RunOptions:
    """What the flags of `add_limits` and `add_sampling` say. Raises OptionError for a wrong value."""
    bias = {"logit_bias": dict(_bias_of(text) for text in options["logit_bias"] or ())}
    return RunOptions(
        Sampling(**_fields_of(options, Sampling) | bias),
        Limits(**_fields_of(options, Limits)),
        Thinking(**_fields_of(options, Thinking)),
    )


def _check_samples(options: Mapping[str, Any]) -> None:
    """A wrong number of samples, and what a vote cannot be given yet."""
    if not 1 <= options["samples"] <= MAX_SAMPLES:
        raise OptionError(f"--samples is {options['samples']:,}, expected a whole number from 1 to {MAX_SAMPLES:,}.")
    if options["all_samples"] and options["confidence"] is not None:
        raise OptionError("--all-samples and --confidence are mutually exclusive.")
    if options["confidence"] is not None and not 0.5 < options["confidence"] < 1.0:
        raise OptionError(f"--confidence is {options['confidence']:g}, expected a number above 0.5 and below 1.")
    for name in ("input", "output", "resume", "answer_now", "save", "save_every", "receipt"):
        if options[name] not in (None, False):
            raise OptionError(
                f"--{name.replace('_', '-')} cannot be combined with --samples yet. Leave one of them out."
            )


def _fields_of(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Only what was given; everything else keeps the one default that stands in its class."""
    names = {each.name for each in fields(kind)}
    values = {name: value for name, value in options.items() if name in names and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _bias_of(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as error:
        raise OptionError(f"--logit-bias is {text!r}, expected ID=NUMBER, for example 198=-5 or 198=-inf.") from error


def _refuse_beside_resume(options: Mapping[str, Any], asked: RunOptions) -> None:
    """A saved run has its own question and settings; options that would be ignored are refused."""
    others = RunOptions(
        Sampling(), Limits(max_tokens=asked.limits.max_tokens, context=asked.limits.context), Thinking()
    )
    if asked != others or options["prompt"] is not None or options["system_prompt"] is not None:
        raise OptionError(
            "--resume goes on with the settings of the file, so only --model, --max-tokens, --context, --answer-now, "
            "--ask-answer, --save, --save-every, --no-save, --force, --receipt, --json and --quiet can be given beside "
            "it. Leave the others out, or start a new run."
        )


def _refuse_beside_input(options: Mapping[str, Any]) -> None:
    """A file of questions needs a file for the answers, and what belongs to one question is refused beside it."""
    if options["input"] is None or options["output"] is None:
        missing = "--input" if options["input"] is None else "--output"
        raise OptionError(f"{missing} is missing. A file of questions takes --input FILE and --output FILE together.")
    for name in _OF_ONE_QUESTION:
        if options[name] not in (None, False):
            raise OptionError(
                f"--{name.replace('_', '-')} applies to a single question; it is not allowed with --input."
            )
