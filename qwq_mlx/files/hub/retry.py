"""How long to try again when a server fails, and when to give up.

Time is measured from the last byte that came, not from the start: a slow fetch of 65 GB may take days, a dead one ends
within a minute, and so does one that brings less than 1,000 bytes a second over a whole minute.

Does not: make requests.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from qwq_mlx.errors import OptionError, SourceError

__all__ = ["LATER", "Attempts", "RetryPolicy", "RetryableError", "retry_after_s", "within"]

LATER = "What was fetched is kept; run the same command again to go on."

_MIN_BYTES_S = 1000  # below the slowest modem; 65 GB would take two years
_MAX_WRONG_ANSWERS = 3
_MAX_WAIT_S = 16.0
_MAX_ASKED_WAIT_S = 600.0
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to try.

    timeout_s: a connection that gives no byte for so long, in seconds, is closed.
    give_up_s: so many seconds after the last byte the fetch fails, and when so many together brought less than 1,000
        bytes each; what a server asks to wait (Retry-After) counts
        extra, up to 10 minutes.
    wait_s: pause in seconds before the first new attempt; it doubles up to 16 s.
    clock, sleep: what seconds are measured and waited by.
    """

    timeout_s: float = 20.0
    give_up_s: float = 60.0
    wait_s: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        for name in ("timeout_s", "give_up_s", "wait_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} is {value!r}, expected a positive number of seconds.")


class RetryableError(Exception):
    """An attempt failed, and the next may not.

    wait_s: what the server asked to wait. is_wrong_answer: it answered, but not with what was asked; three of these end
    the fetch.
    """

    def __init__(self, reason: str, *, wait_s: float = 0.0, is_wrong_answer: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.is_wrong_answer = is_wrong_answer


class Attempts:
    """Counts failures since the last byte, pauses between attempts, and says when to give up."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self._url, self._policy, self._n_wrong = url, policy, 0
        self._last_byte_s, self._wait_s, self._asked_s = policy.clock(), policy.wait_s, 0.0
        self._window_s, self._window_bytes = self._last_byte_s, 0  # what the rate is measured over

    def succeeded(self, n_bytes: int) -> None:
        """Bytes came: time is counted from now. Raises SourceError where they come too slowly to ever end."""
        self._last_byte_s, self._wait_s, self._asked_s = self._policy.clock(), self._policy.wait_s, 0.0
        self._window_bytes += n_bytes
        seconds = self._policy.clock() - self._window_s
        if seconds < self._policy.give_up_s:
            return
        if self._window_bytes < _MIN_BYTES_S * seconds:
            raise SourceError(
                f"{self._url}: only {self._window_bytes:,} bytes came in {seconds:.0f} s, expected at least "
                f"{_MIN_BYTES_S:,} a second. Try another network or a mirror (HF_ENDPOINT). {LATER}"
            )
        self._window_s, self._window_bytes = self._policy.clock(), 0

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt. Raises SourceError when there is to be none."""
        if isinstance(error, RetryableError):
            self._n_wrong += error.is_wrong_answer
        asked_s = error.wait_s if isinstance(error, RetryableError) else 0.0
        self._asked_s += asked_s
        silent_s = self._policy.clock() - self._last_byte_s
        reason = str(error) or type(error).__name__
        if self._asked_s > _MAX_ASKED_WAIT_S:
            raise SourceError(
                f"{self._url}: {reason} and asks to wait {asked_s:,.0f} s more; at most {_MAX_ASKED_WAIT_S:,.0f} s are "
                f"waited. Run the same command again after that. What was fetched is kept."
            ) from error
        if self._n_wrong == _MAX_WRONG_ANSWERS:
            raise SourceError(f"{self._url}: {reason}, {_MAX_WRONG_ANSWERS} times. {LATER}") from error
        if silent_s - self._asked_s > self._policy.give_up_s:
            raise SourceError(
                f"{self._url}: {reason}; gave up after {silent_s:.0f} s without a byte. {LATER}"
            ) from error
        self._policy.sleep(max(self._wait_s, asked_s))
        self._window_s += asked_s
        self._wait_s = min(2 * self._wait_s, _MAX_WAIT_S)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; Retry-After's other form, a date, is answered by the usual pause."""
    text = headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def within(seconds: float, ask: Callable[[], _Answer]) -> _Answer:
    """What a request gives, for a library that bounds the pause between two bytes but not the whole answer.

    It runs in a thread of its own, which is left behind (and ends with the process) where it takes longer.
    Raises TimeoutError then, and whatever the request raises.
    """
    answer: Future[_Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([answer], timeout=seconds).done:
        raise TimeoutError(f"no whole answer in {seconds:g} s")
    return answer.result()
