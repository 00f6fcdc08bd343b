"""Signs of life of several processes that hold a model together: who has failed, and how.

Collectives have no deadline, so whoever waits in one for a process that is gone waits for ever. There are three ways to
fail, and each is named: a process says nothing (it is dead or stopped, or its machine is gone); two processes do not
hear each other though both are heard here (their link is lost); all are heard and nobody finishes anything.

Does not: read signs or end anything (`launch` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["START_S", "Watch"]

START_S = 60.0
"""Until a process has joined the others: it imports, beside all others, perhaps over ssh, and MLX says nothing while it
looks for them."""
SILENT_S = 7.0
"""From then on. A busy machine lets a process wait for seconds; what it takes to notice fits into 10 s, too."""
STUCK_S = 30.0
"""In which somebody has to finish something; ten times the longest wait so far where that is more."""
FIRST_STUCK_S = 300.0
"""The same while weights are read, and in the first passes, for which CUDA compiles kernels for a minute or two."""
SWAPPING_S = 30.0
"""In which a process may read its memory from disk all the time: tokens take seconds each, and the machine suffers."""
_FIRST_PASSES = 4
_FAULTS_S = 5.0  # in which a process that swaps reads so many pages from disk
_LESS = "Give it less (fewer bits, a smaller context), or end what else runs there"
_FRESH_S = 3.0
_MANY_FAULTS = 1_000


class Watch:
    """names: of each process, for messages. silent_s: after which one has failed. clock: seconds.
    join_s: in which all find each other once all look, None as long as silent_s.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        silent_s: float = SILENT_S,
        join_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names, self._silent_s, self._clock = list(names), silent_s, clock
        self._join_s = silent_s if join_s is None else join_s
        self._started = self._moved = clock()
        self._forgiven = -_FRESH_S
        self._heard: list[float | None] = [None] * len(names)
        self._last: list[Mapping[str, Any]] = [{} for _ in names]
        self._faults: list[int] = [0] * len(names)  # when somebody finished something last
        self._slowest_s = 0.0
        self._first_heard: dict[int, float] = {}
        self._read: dict[int, tuple[float, int]] = {}  # pages from disk up to a moment, by process
        self._swapping: dict[int, tuple[float, int]] = {}  # since when, and pages before that
        self._is_slow = False
        self._joining: dict[int, float] = {}  # since when each looks for the others
        self._joined: set[int] = set()

    def hear(self, rank: int, sign: Mapping[str, Any]) -> None:
        """Take a sign of life."""
        before, now = self._last[rank], self._clock()
        self._heard[rank], self._last[rank] = now, sign
        self._first_heard.setdefault(rank, now)
        if sign.get("is_joining"):
            self._joining.setdefault(rank, now)
        if sign.get("silent_s"):
            self._joined.add(rank)
        if sign.get("done", 0) != before.get("done", 0):
            if before.get("passes", 0) >= _FIRST_PASSES and not before.get("is_loading"):
                self._slowest_s = max(self._slowest_s, min(before.get("waiting_s", 0.0), now - self._moved))
            self._moved = now
            self._faults = [each.get("faults", 0) for each in self._last]

    def sign(self, rank: int) -> Mapping[str, Any]:
        """The last that was heard of a process."""
        return self._last[rank]

    def pid(self, rank: int) -> int | None:
        """Of a process, as it says itself."""
        return self._last[rank].get("pid")

    def warning(self) -> str | None:
        """Once, a process that swaps though all go on, and how much it reads from disk. To be asked all the time."""
        words = None
        for rank, sign in enumerate(self._last):
            now, faults = self._clock(), sign.get("faults", 0)
            since, before = self._read.setdefault(rank, (now, faults))
            if now - since < _FAULTS_S:
                continue
            self._read[rank] = (now, faults)
            if sign.get("passes", 0) < _FIRST_PASSES or faults - before <= _MANY_FAULTS:
                self._swapping.pop(rank, None)
                continue
            self._swapping.setdefault(rank, (since, before))
            if not self._is_slow:
                self._is_slow = True
                words = (
                    f"process {rank} of {len(self._last)} ({self._names[rank]}) read {faults - before:,} pages of its "
                    f"memory from disk in {now - since:.0f} s: it swaps, and all wait for it. {_LESS}; the run is "
                    f"saved and ended if this lasts {SWAPPING_S:.0f} s"
                )
        return words

    def forgive(self) -> None:
        """Judge from now on: whoever calls was stopped or starved, so that it did not hear says nothing of others."""
        self._started = self._moved = self._forgiven = now = self._clock()
        self._swapping.clear()
        self._read.clear()
        self._heard = [None if each is None else now for each in self._heard]
        self._first_heard = dict.fromkeys(self._first_heard, now)
        last = max(self._joining.values(), default=now)
        self._joining = {rank: since + now - last for rank, since in self._joining.items()}

    def unmet(self) -> list[int]:
        """Processes that have not joined the others and say nothing: they may be stopped, or MLX keeps them busy."""
        return [
            rank for rank in range(len(self._last)) if rank not in self._joined and self._age(rank) > self._silent_s
        ]

    def failure(self) -> tuple[int, str] | None:
        """The process that has failed, and what is wrong with it; None while all is well."""
        return self._silent() or self._unjoined() or self._lost_link() or self._swapped() or self._stuck()

    def _age(self, rank: int) -> float:
        heard = self._heard[rank]
        return self._clock() - (self._started if heard is None else heard)

    def _silent(self) -> tuple[int, str] | None:
        limits = [self._silent_s if rank in self._joined else START_S for rank in range(len(self._last))]
        late, rank = max((self._age(rank) - limit, rank) for rank, limit in enumerate(limits))
        if late <= 0:
            return None
        return rank, f"gave no sign of life for {limits[rank]:.0f} s (it is stopped, or its machine or network is gone)"

    def _unjoined(self) -> tuple[int, str] | None:
        now = self._clock()
        missing = [rank for rank in range(len(self._last)) if rank not in self._joined]
        if missing and all(rank in self._joining for rank in missing):
            # MLX's ring asks for a neighbour that is not there yet after 1, 2, 4, 8 and 16 s, so that processes which
            # were there at different times find each other as much later again.
            first, last = min(self._joining.values()), max(self._joining.values())
            limit = self._join_s + last - first
            late = missing if now - last > limit else []
        else:
            limit = START_S
            late = [rank for rank in missing if now - self._first_heard.get(rank, now) > START_S]
        if not late:
            return None
        return max(late), (
            f"and the others have not found each other for {limit:.0f} s: the network between them is lost, or a "
            "firewall refuses connections to Python"
        )

    def _lost_link(self) -> tuple[int, str] | None:
        if self._clock() - self._forgiven < _FRESH_S:
            return None  # signs that lay in a pipe meanwhile tell of then
        for rank, sign in enumerate(self._last):
            for peer, silent_s in sign.get("silent_s", {}).items():
                other = int(peer)
                if silent_s > self._silent_s and max(self._age(rank), self._age(other)) < _FRESH_S:
                    culprit = max(rank, other)
                    return culprit, (
                        f"and {self._names[min(rank, other)]} have not heard each other for {silent_s:.0f} s, though "
                        "both are alive: the network between them is lost"
                    )
        return None

    def _swapped(self) -> tuple[int, str] | None:
        for rank, (since, before) in self._swapping.items():
            if self._read[rank][0] - since >= SWAPPING_S:
                n_pages, seconds = self._read[rank][1] - before, self._read[rank][0] - since
                return rank, f"read {n_pages:,} pages of its memory from disk in {seconds:.0f} s: it swaps. {_LESS}"
        return None

    def _stuck(self) -> tuple[int, str] | None:
        waiting_s = min(max(each.get("waiting_s", 0.0) for each in self._last), self._clock() - self._moved)
        if self._last[0].get("is_asking"):
            self._moved = self._clock()  # somebody thinks about a question, and all wait for the answer
            return None
        is_warm = self._last[0].get("passes", 0) >= _FIRST_PASSES
        limit = max(STUCK_S, 10 * self._slowest_s) if is_warm else FIRST_STUCK_S
        if waiting_s < limit:
            return None
        faults = [each.get("faults", 0) - before for each, before in zip(self._last, self._faults, strict=True)]
        most = max(range(len(faults)), key=faults.__getitem__)
        if faults[most] > _MANY_FAULTS:
            return most, (
                f"finished nothing for {limit:.0f} s and read {faults[most]:,} pages of its memory from disk "
                f"meanwhile: it swaps. {_LESS}"
            )
        behind = min(range(1, len(self._last)), key=lambda rank: self._last[rank].get("done", 0))
        return behind, f"and the others wait for each other for {limit:.0f} s and finish nothing: it hangs"
