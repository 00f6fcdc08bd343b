"""KV caches of runs that have ended, for prompts that begin with the same ids: the next turn feeds only what is new.

A cache is moved, not copied: whoever takes it over has it alone, and leaves its own when it ends. So a prompt that only
begins like an earlier one (with the same system prompt, say) leaves that one's cache where it is.

Does not: outlive the process, or know how much memory there is (`rows` drops the oldest where a request needs it).
"""

from __future__ import annotations

from collections.abc import Sequence

from qwq_mlx.generate.request import Request
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.memory.activations import n_positions

__all__ = ["PrefixCache"]

_MIN_SHARED = 32  # ids; fewer are fed faster than looked for
_MIN_SHARE = 0.5  # of the earlier prompt


class PrefixCache:
    """`keep` a stream that has ended, `take` one for a new request.

    n_entries: kept at most; the oldest goes first.
    """

    def __init__(self, n_entries: int) -> None:
        self._n_entries = n_entries
        self._streams: list[Stream] = []  # the oldest first

    @property
    def n_bytes(self) -> int:
        """What the caches hold."""
        return sum(_bytes_of(stream) for stream in self._streams)

    def keep(self, stream: Stream) -> None:
        """Take the cache of a stream that has ended; one that failed, or fed nothing, is given back."""
        if stream.failure is not None or not stream.running.row.ids or not self._n_entries:
            stream.release_cache()
            return
        self._streams.append(stream)
        if len(self._streams) > self._n_entries:
            self.drop_oldest()

    def take(self, request: Request) -> Stream | None:
        """The stream whose ids agree longest with a prompt, None where none is worth it. It is kept no longer."""
        best, most = None, 0
        for stream in self._streams:
            n_shared = _n_shared(stream.running.row.ids, request.prompt_ids)
            if n_shared > most and n_shared >= max(_MIN_SHARED, _MIN_SHARE * len(stream.request.prompt_ids)):
                best, most = stream, n_shared
        if best is not None:
            self._streams.remove(best)
        return best

    def drop_oldest(self) -> None:
        """Give the memory of one back. There must be one."""
        self._streams.pop(0).release_cache()

    def __len__(self) -> int:
        return len(self._streams)


def _n_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading ids that agree."""
    n = min(len(first), len(second))
    return next((place for place in range(n) if first[place] != second[place]), n)


def _bytes_of(stream: Stream) -> int:
    return stream.request.plan.kv_bytes_per_token * n_positions(len(stream.running.row.ids))
