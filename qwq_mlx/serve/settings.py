"""What a server is started with; every default stands here once.

Does not: parse flags (`__main__` does).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwq_mlx.errors import OptionError
from qwq_mlx.options import LOOP_ACTIONS, Thinking

__all__ = [
    "NO_THINK",
    "REASONING_FIELDS",
    "SERVED_LOOP_ACTIONS",
    "NoThink",
    "ReasoningField",
    "Settings",
    "is_loopback",
]

ReasoningField = Literal["both", "reasoning", "reasoning_content", "none", "think-tags"]
NoThink = Literal["hide", "answer-now"]
REASONING_FIELDS: tuple[ReasoningField, ...] = ("both", "reasoning", "reasoning_content", "none", "think-tags")
SERVED_LOOP_ACTIONS = tuple(action for action in LOOP_ACTIONS if action != "nudge")
"""Those that take back no text: clients have it already."""
NO_THINK: tuple[NoThink, ...] = ("hide", "answer-now")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server listens, whom it lets in, and how it answers.

    host: address to listen on; other than loopback needs api_key.
    port: 0 takes a free one.
    api_key: what clients must send; None asks for none.
    allowed_hosts: names in the Host header besides localhost, *.localhost, *.local and IP addresses.
    allowed_origins: of web pages, besides those of this machine and of desktop applications.
    body_bytes: largest request body.
    name: of the model, as clients see it; None takes the folder's.
    width: requests decoded side by side, at most.
    context: positions of one request, prompt included; None takes what the memory allows.
    prefill_step: prompt ids per pass, which is all that running requests wait for.
    prefixes: KV caches of ended requests that are kept, as far as the memory allows, for prompts that begin alike.
    queue: requests that may wait for a row; more get status 429.
    reasoning_field: where OpenAI's dialect puts the thinking.
    no_think: what a client gets that asks for no thinking: the thinking hidden, or the answer asked for at once.
    thinking: budget and loop action of requests that name none.
    heartbeat_s: seconds of silence after which a waiting client gets a sign of life.
    runs_folder: where runs are saved that clients ask to save; None saves none.
    history_bytes: of watched runs that are kept in a file, compressed; the oldest go first.
    drain_s: seconds that requests and runs under way get after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    body_bytes: int = 16 << 20
    name: str | None = None
    width: int = 8
    context: int | None = None
    prefill_step: int = 256
    prefixes: int = 8
    queue: int = 32
    reasoning_field: ReasoningField = "both"
    no_think: NoThink = "hide"
    thinking: Thinking = field(default_factory=Thinking)
    heartbeat_s: float = 10.0
    drain_s: float = 30.0
    runs_folder: Path | None = None
    history_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.api_key is None:
            raise OptionError(
                f"host is {self.host!r}, which others can reach, and there is no api_key. Give `api_key` or "
                "`api_key_file`, or listen on 127.0.0.1."
            )
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise OptionError("api_key is empty or holds characters that no header can, expected ASCII.")
        if self.runs_folder is not None and not self.runs_folder.is_dir():
            raise OptionError(f"runs_folder is '{self.runs_folder}', which is no folder. Make it, or name another.")
        if self.thinking.on_loop == "nudge":
            raise OptionError("on_loop is 'nudge', which takes back text that clients have already, expected another.")
        for name, low, high in (
            ("port", 0, 65_535),
            ("width", 1, 64),
            ("prefixes", 0, 64),
            ("queue", 0, 100_000),
            ("body_bytes", 1, 1 << 30),
            ("history_bytes", 1, 1 << 50),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {low} to {high:,}.")
        for name in ("heartbeat_s", "drain_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected seconds above 0 up to 86,400.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
