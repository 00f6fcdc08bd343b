"""Counts of a server since its start, as Prometheus reads them.

Does not: keep anything of a request but its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

__all__ = ["Counters", "Memory", "prometheus_text"]


@dataclass(slots=True)
class Counters:
    """Written by the model's thread alone, read by any.

    ended: choices that came to their end.
    failed: choices that could not go on.
    left: choices whose client left.
    prompt_tokens: of choices that ended.
    cached_tokens: of them those that a cache held.
    output_tokens: of choices that ended.
    reasoning_tokens: of them those of the thinking.
    """

    ended: int = 0
    failed: int = 0
    left: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class Memory(NamedTuple):
    """The device's memory in bytes.

    used: by all arrays. planned: at most, for what runs and the caches that are kept. limit: what the device gives;
    None where nothing is refused.
    """

    used: int = 0
    planned: int = 0
    limit: int | None = None


def prometheus_text(counters: Counters, *, running: int, waiting: int, is_ready: bool) -> str:
    """The text format of Prometheus, version 0.0.4.

    running: rows that are taken. waiting: requests in the line. is_ready: requests are answered.

    >>> print(prometheus_text(Counters(ended=2), running=1, waiting=0, is_ready=True).splitlines()[1])
    qwq_mlx_ended_total 2
    """
    lines = []
    for each in fields(Counters):
        name = f"qwq_mlx_{each.name}_total"
        lines += [f"# TYPE {name} counter", f"{name} {getattr(counters, each.name)}"]
    for gauge, value in (("running_rows", running), ("waiting_requests", waiting), ("ready", int(is_ready))):
        lines += [f"# TYPE qwq_mlx_{gauge} gauge", f"qwq_mlx_{gauge} {value}"]
    return "\n".join(lines) + "\n"
