"""A text through a `Splitter` as it streams: in pieces of a few characters."""

from __future__ import annotations

from qwq_mlx.reasoning.answer import Split, Splitter
from qwq_mlx.reasoning.profile import find_profile


def split(text: str, *, tagged: bool = False, prompt: str | None = None, is_ended: bool = True, size: int = 3) -> Split:
    """What a splitter finds in a text. size: characters of a piece."""
    splitter = Splitter(find_profile("qwq-tagged" if tagged else "qwq-preview"), prompt=prompt)
    for at in range(0, len(text), size):
        splitter.feed(text[at : at + size])
    return splitter.finish(is_ended=is_ended)
