"""What rank 0 tells the other processes that hold a model with it: the passes that they are to make, and over which
KV caches (vLLM's and nano-vllm's model runner, called over a connection).

Rank 0 alone knows texts, requests and settings, draws ids, drafts and decides. What it decides by its clock, its memory
or a signal therefore never differs between ranks.

Does not: run the model (`engine.model_runner` does).
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from qwq_mlx.engine.ranks.link import Link
from qwq_mlx.errors import RankError

__all__ = ["Leader", "Mirror", "leader_of", "mirror_of"]


class Leader:
    """Rank 0 of a group, with one model. links: to every other rank."""

    def __init__(self, group: Any, links: Sequence[Link]) -> None:
        self.group = group
        self.links = list(links)
        self._keys = itertools.count(1)
        self._dropped: deque[int] = deque()
        self._end = ""  # why it leads no longer

    @property
    def size(self) -> int:
        """Processes that hold the model."""
        return len(self.links) + 1

    def tell(self, task: str, values: Mapping[str, Any] | None = None) -> None:
        """Tell all what to do next; they do it in this order. Raises RankError where one has gone, or may be elsewhere
        after a failure here."""
        if self._end:
            raise RankError(f"The other processes cannot go on with this model: {self._end}.")
        message = {"task": task, **(values or {})}
        if self._dropped:
            message["dropped"] = [self._dropped.popleft() for _ in range(len(self._dropped))]
        with self.in_step():
            for link in self.links:
                link.send(message)

    def ask(self, task: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Tell all, and wait for what each says, in the order of ranks. Raises RankError where one has gone."""
        self.tell(task, values)
        return [link.receive() for link in self.links]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Within it all do the same, and whatever is raised here is a failure (`fail`)."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the others nothing more: they may wait in the midst of what failed here, and would add its sums to those
        of the next pass."""
        failure = f"process 0 failed in the midst of what all do ({type(error).__name__}: {error}). Start all again"
        self._end = self._end or failure

    def successor(self) -> Leader:
        """Who leads the same processes with the next model; with this one they cannot go on. Raises RankError."""
        if self._end:
            raise RankError(f"The other processes cannot take a model: {self._end}.")
        self._end = "another one was loaded since. Load this one again"
        return Leader(self.group, self.links)

    def next_key(self) -> int:
        """A name that no KV cache has had."""
        return next(self._keys)

    def mirror(self, cache: Sequence[Any], key: int | None = None) -> Mirror:
        """The name of a KV cache, under which the others have their parts of it; it ends with the cache."""
        mirror = Mirror(self, self.next_key() if key is None else key)
        cache[0].mirror = mirror
        weakref.finalize(cache[0], self._dropped.append, mirror.key).atexit = False
        return mirror

    def take_stop(self) -> bool:
        """Whether somebody pressed Ctrl-C at another rank since the last call."""
        asked = [link for link in self.links if link.is_asked_to_stop]
        for link in asked:
            link.is_asked_to_stop = False
        return bool(asked)

    def close(self) -> None:
        """Let the others end, those that have not."""
        for link in self.links:
            with suppress(RankError):
                link.send({"task": "end"})


class Mirror(NamedTuple):
    """Under which name the other ranks have their parts of a KV cache."""

    leader: Leader
    key: int


def leader_of(module: Any) -> Leader | None:
    """Who leads the processes that hold a module together; None where it is whole in this process."""
    leader: Leader | None = getattr(module, "leader", None)
    return leader


def mirror_of(cache: Sequence[Any]) -> Mirror | None:
    """None where no other process has a part of the cache."""
    mirror: Mirror | None = getattr(cache[0], "mirror", None)
    return mirror
