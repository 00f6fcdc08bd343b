"""How fast the link between ranks is: what an all_sum costs, small as in decoding and large as in prefill.

Does not: know who is linked to whom; it is what the slowest of them takes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from qwq_mlx.model.upstream import import_mlx

__all__ = ["LinkSpeed", "measure_link"]

_SMALL, _LARGE = 5_120 * 2, 8 << 20  # bytes: hidden states of one id of the 32B, and of 800
_WARM = 5


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """latency_s: of an all_sum of 10 kB. bytes_per_s: of one of 8 MB."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, n_bytes: int) -> float:
        """What an all_sum of so many bytes takes."""
        return self.latency_s + max(0, n_bytes - _SMALL) / self.bytes_per_s


def measure_link(group: Any, *, seconds: float = 5.0) -> LinkSpeed:
    """Time sums over all ranks; call it on every rank at the same time, with the same seconds.

    The median of as many as half of the seconds take, small ones first.
    """
    small = _median(group, _SMALL, seconds / 2)
    large = _median(group, _LARGE, seconds / 2)
    return LinkSpeed(latency_s=small, bytes_per_s=(_LARGE - _SMALL) / max(large - small, 1e-9))


def _median(group: Any, n_bytes: int, seconds: float) -> float:
    """Seconds of an all_sum. All ranks make as many, the number that the first of them say."""
    mx = import_mlx()
    array = mx.ones((n_bytes // 4,), mx.float32)
    mx.eval(array)

    def timed() -> float:
        began = time.perf_counter()
        mx.eval(mx.distributed.all_sum(array, group=group))
        return time.perf_counter() - began

    first = [timed() for _ in range(_WARM)]
    # all have to make the same number, so it is agreed on: the least that any of them would
    wanted = mx.array([min(int(seconds / max(statistics.median(first), 1e-6)), 10_000)], mx.int32)
    n = int(mx.distributed.all_min(wanted, group=group).item())
    return statistics.median([timed() for _ in range(max(n, _WARM))])
