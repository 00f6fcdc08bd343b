"""The options of `python -m qwq_mlx.generate` that fill Sampling, Limits and Thinking; each default is read from there.

Does not: parse (the command does), or check a value (the classes do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from qwq_mlx.options import LOOP_ACTIONS, Limits, Sampling, Thinking

__all__ = ["add_limits", "add_sampling"]


def add_limits(add: Callable[..., Any]) -> None:
    """Options of Limits and Thinking. add: a parser's add_argument."""
    answer_tokens, on_loop = _default(Thinking, "answer_tokens"), _default(Thinking, "on_loop")
    add("--max-tokens", type=int, metavar="N", help="tokens to produce at most (default: the room left in the context)")
    add("--context", type=int, metavar="N", help="positions to use at most, prompt included (default: the model's own)")
    add("--kv-bits", type=_bits, choices=(8, 4, "auto"), help="quantize the KV cache (default: not)")
    add(
        "--prefill-step",
        type=int,
        metavar="N",
        help=f"prompt ids per pass (default: {_default(Limits, 'prefill_step')})",
    )
    add("--stop", action="append", metavar="TEXT", help="end where this text comes, without it; repeatable")
    add(
        "--think-tokens",
        type=int,
        metavar="N",
        help="ask for the answer after N tokens of thinking (default: no budget)",
    )
    add("--answer-tokens", type=int, metavar="N", help=f"tokens of an answer asked for (default: {answer_tokens})")
    add("--on-loop", choices=LOOP_ACTIONS, help=f"what to do when the text goes round in a loop (default: {on_loop})")


def add_sampling(add: Callable[..., Any]) -> None:
    """Options of Sampling, bans and the language guard. add: a parser's add_argument."""
    multiplier, base = _default(Sampling, "dry_multiplier"), _default(Sampling, "dry_base")
    length, order = _default(Sampling, "dry_allowed_length"), _default(Sampling, "order")
    add("--temp", type=float, metavar="T", dest="temperature", help="temperature; 0 is greedy")
    add("--top-p", type=float, metavar="P", help="keep the likeliest ids that hold P together; 1 keeps all")
    add("--top-k", type=int, metavar="K", help="keep the K likeliest ids; 0 keeps all")
    add("--min-p", type=float, metavar="P", help="drop ids below P times the likeliest one's probability")
    add("--seed", type=int, metavar="N", help="of the draws (default: drawn, and shown)")
    add("--repetition-penalty", type=float, metavar="X", help="over prompt and output; 1 is off")
    add("--presence-penalty", type=float, metavar="X", help="over the output; 0 is off")
    add("--frequency-penalty", type=float, metavar="X", help="over the output; 0 is off")
    add("--dry-multiplier", type=float, metavar="X", help=f"strength of DRY; 0 is off (default: {multiplier})")
    add("--dry-base", type=float, metavar="X", help=f"growth of DRY per repeated id (default: {base})")
    add("--dry-allowed-length", type=int, metavar="N", help=f"repeat that DRY allows (default: {length})")
    add("--logit-bias", action="append", metavar="ID=X", help="add X to the logit of an id, -inf bans it; repeatable")
    add("--ban", action="append", metavar="TEXT", dest="banned", help="a text that is never written; repeatable")
    add(
        "--language-guard",
        action="store_true",
        default=None,
        help="no letters of scripts that the question does not use, but quoted, in formulas or in brackets",
    )
    add("--order", choices=("hf", "mlx-lm"), help=f"order of the sampling steps (default: {order})")


def _default(options: type, name: str) -> Any:
    return next(each.default for each in fields(options) if each.name == name)


def _bits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
