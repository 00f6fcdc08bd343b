"""Feeds ids of rows to one model, each row with its KV cache (nano-vllm's model runner): prompts, and passes of a step.

Where several processes hold the model, this is rank 0, and what it does the others are told to do with their parts.

Does not: draw, or know rows (`decoder` does).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.activation_taps import ActivationTaps
from qwq_mlx.engine.kv_cache import grow
from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.engine.ranks.leader import leader_of, mirror_of
from qwq_mlx.model.blas import uses_blas
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS, MIN_BLAS_ROWS
from qwq_mlx.model.ranks import ranks_of
from qwq_mlx.model.rotations import rotations_in_place
from qwq_mlx.model.row_caches import joined

__all__ = ["ModelRunner", "batches_from", "feed_prompt", "run_pass"]


class ModelRunner:
    """module: mlx_lm's Qwen2. reproducible: rows never attend in a batch.

    taps: of the hidden states of the last pass.
    """

    def __init__(self, module: Any, *, reproducible: bool = False) -> None:
        self._module = module
        self._leader = leader_of(module)
        self._batches_from = batches_from(module, reproducible=reproducible)
        self.taps = ActivationTaps(module)

    def prefill(self, cache: Sequence[Any], ids: Sequence[int]) -> None:
        """Feed ids behind what the cache holds, without the output matrix; waits for it."""
        with self._in_step():
            if self._leader is not None:
                self._leader.tell("prefill", {"row": _row(cache), "ids": list(ids)})
            feed_prompt(self._module, cache, ids)

    def logits(
        self,
        caches: Sequence[Sequence[Any]],
        fed: Sequence[Sequence[int]] | mx.array,
        n_each: Sequence[int],
        *,
        hidden_layers: Collection[int] = (),
    ) -> mx.array:
        """The logits behind each id, or behind the last of a single row's ids; unread, (ids, vocab).

        fed: (ids, 1), the rows' ids one after another, or (1, n) of a single row; an array may be unread. n_each: ids
        of each row.
        """
        is_read = not isinstance(fed, mx.array)
        ids = fed if isinstance(fed, mx.array) else mx.array([list(each) for each in fed])
        module = self.taps.module(hidden_layers)
        with self._in_step():
            if self._leader is not None:
                rows = [[*_row(cache), n] for cache, n in zip(caches, n_each, strict=True)]
                self._leader.tell("pass", {"rows": rows, "shape": list(ids.shape), "ids": fed if is_read else None})
                if not is_read:
                    ids = mx.distributed.all_sum(ids.astype(mx.uint32), group=self._leader.group)
            with self._starting():  # on the CPU many rows are computed here, and so waited for
                logits: mx.array = run_pass(module, ids, caches, n_each, batches_from=self._batches_from)[:, -1]
            if self._leader is not None:  # each pass on its own, so that all ranks meet in the same order
                self.start([logits])
        return logits

    def start(self, arrays: Sequence[mx.array]) -> None:
        """Let the device begin with what was built."""
        with self._starting():
            mx.async_eval(*arrays)  # type: ignore[no-untyped-call]

    def take_stop(self) -> bool:
        """Whether another process was asked to stop since the last call."""
        return self._leader is not None and self._leader.take_stop()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it a pass is waited for, perhaps for other processes, too."""
        if self._leader is None:
            yield
            return
        try:
            with activity.waiting():
                yield
        except (RuntimeError, MemoryError) as error:
            self._leader.fail(error)
            raise

    def _in_step(self) -> AbstractContextManager[None]:
        return nullcontext() if self._leader is None else self._leader.in_step()

    def _starting(self) -> AbstractContextManager[None]:
        return nullcontext() if self._leader is None else activity.starting()


def batches_from(module: Any, *, reproducible: bool) -> int | None:
    """Rows of a pass from which they attend in a batch, whose bits are not those of a row alone; None is never.

    On the CPU fewer rows than BLAS multiplies have the bits that they have alone.
    """
    if reproducible:
        return None
    if mx.default_device().type != mx.cpu:
        return 1
    return MIN_BLAS_ROWS if uses_blas(module) else None


def feed_prompt(module: Any, cache: Sequence[Any], ids: Sequence[int]) -> None:
    """Feed ids to one cache; waits for it."""
    grow(cache, len(ids))
    # without the output matrix: only the last id's logits are asked for
    result, ranks = module.model(mx.array([list(ids)]), cache=cache), ranks_of(module)
    with activity.waiting():
        for layer in cache:
            mx.eval(layer.state)  # one by one: the device's queue would hold the intermediates of many layers
            activity.step()
        if ranks is not None and ranks.sends:
            mx.eval(result)


def run_pass(
    module: Any, ids: mx.array, caches: Sequence[Sequence[Any]], n_each: Sequence[int], *, batches_from: int | None
) -> Any:
    """One pass of a module over ids, (ids, 1), or (1, n) of a single row; unread. batches_from: see the function of
    that name."""
    for cache, n in zip(caches, n_each, strict=True):
        grow(cache, n)
    is_in_place, n = rotations_in_place(module) is not None, ids.shape[1]
    if n > (MAX_FEW_ROWS if is_in_place else 1):  # of one row, as a prompt is fed
        [layers] = caches
        return module(ids, cache=layers)
    # several of one row, in place, have the bits that they have one after another
    may_batch = batches_from is not None and len(caches) >= batches_from
    logits = module(ids.reshape(-1, 1), cache=joined(caches, n_each, may_batch=may_batch, module=module))
    if is_in_place:  # what is done with the caches from now on must come behind the pass
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
    return logits if n == 1 else logits.swapaxes(0, 1)


def _row(cache: Sequence[Any]) -> list[int]:
    """How the other ranks find their part of a cache, and how many positions of it count."""
    mirror = mirror_of(cache)
    assert mirror is not None, "new_cache gives every cache of a shared model a mirror"
    return [mirror.key, int(cache[0].offset)]
