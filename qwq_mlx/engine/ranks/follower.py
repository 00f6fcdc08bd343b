"""A rank other than 0: it makes the passes that rank 0 tells it, over its part of the model and of the KV caches.

It knows neither texts nor settings, and computes no logits. Each pass begins while the one before is under way, as on
rank 0; ids that rank 0 has drawn but not read yet come through MLX.

Does not: load its part (`generate.following` does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.kv_cache import borrowed, empty_cache, filled_cache, forked_cache, take_out_of_batch
from qwq_mlx.engine.model_runner import batches_from, feed_prompt, run_pass
from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.engine.ranks.cache_parts import received_layers, send_parts
from qwq_mlx.errors import RankError

__all__ = ["Follower"]

_CLEAR_EVERY = 256  # passes, as the decoder


class Follower:
    """Does what rank 0 tells, with one module.

    group: of all ranks. reproducible: as rank 0 loaded the model. check_model: called before each pass; raises
    DamagedModelError.
    """

    def __init__(
        self, module: Any, group: Any, *, reproducible: bool, check_model: Callable[[], None] | None = None
    ) -> None:
        self._module, self._group = module, group
        self._batches_from = batches_from(module, reproducible=reproducible)
        self._check_model = check_model or (lambda: None)
        self._caches: dict[int, list[Any]] = {}
        self._borrowed = ExitStack()
        self._previous: mx.array | None = None
        self._n_passes = 0

    def do(self, message: Mapping[str, Any]) -> None:
        """One task. Raises RankError for one that it does not know, DamagedModelError, and what MLX raises."""
        for key in message.get("dropped", ()):
            self._caches.pop(key, None)
        tasks: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "new": self._new,
            "prefill": self._prefill,
            "pass": self._pass,
            "fork": self._fork,
            "borrow": self._borrow,
            "give_back": self._give_back,
            "leave": self._leave,
            "gather": self._gather,
            "scatter": self._scatter,
        }
        task = tasks.get(message.get("task", ""))
        if task is None:
            raise RankError(f"Process 0 asks for {message.get('task')!r}, which this version of qwq_mlx does not know.")
        task(message)

    def _cache(self, key: int, offset: int) -> list[Any]:
        """A cache, cut back as rank 0 has cut its own."""
        cache = self._caches[key]
        for layer in cache:
            if layer.offset > offset:
                layer.trim(layer.offset - offset)
        return cache

    def _new(self, message: Mapping[str, Any]) -> None:
        self._caches[message["key"]] = empty_cache(self._module, message["kv_bits"])

    def _prefill(self, message: Mapping[str, Any]) -> None:
        self._check_model()
        key, offset = message["row"]
        feed_prompt(self._module, self._cache(key, offset), message["ids"])
        mx.clear_cache()

    def _pass(self, message: Mapping[str, Any]) -> None:
        self._check_model()
        caches = [self._cache(key, offset) for key, offset, _ in message["rows"]]
        if message["ids"] is None:
            ids = mx.distributed.all_sum(mx.zeros(message["shape"], mx.uint32), group=self._group)
        else:
            ids = mx.array(message["ids"], mx.uint32)
        n_each = [n for _, _, n in message["rows"]]
        with activity.starting():  # on the CPU many rows are computed here, and so waited for
            hidden = run_pass(self._module.model, ids, caches, n_each, batches_from=self._batches_from)
            mx.async_eval(hidden)  # type: ignore[no-untyped-call]
        if self._previous is not None:
            with activity.waiting():
                mx.eval(self._previous)
        self._previous = hidden
        self._n_passes += 1
        if self._n_passes % _CLEAR_EVERY == 0:
            mx.clear_cache()

    def _fork(self, message: Mapping[str, Any]) -> None:
        source = self._caches[message["source"]]
        self._caches[message["key"]] = forked_cache(self._module, source, message["n_ids"], message["kv_bits"])

    def _borrow(self, message: Mapping[str, Any]) -> None:
        key, offset = message["row"]
        self._borrowed.enter_context(borrowed(self._cache(key, offset), message["n_ids"]))

    def _give_back(self, message: Mapping[str, Any]) -> None:
        self._borrowed.close()

    def _leave(self, message: Mapping[str, Any]) -> None:
        take_out_of_batch(self._caches[message["key"]])

    def _gather(self, message: Mapping[str, Any]) -> None:
        key, offset = message["row"]
        send_parts(self._module, self._cache(key, offset), message["n_ids"], message["arrays"])

    def _scatter(self, message: Mapping[str, Any]) -> None:
        layers = received_layers(self._module, message["arrays"], message["capacity"])
        self._caches[message["key"]] = filled_cache(self._module, layers, message["kv_bits"])
