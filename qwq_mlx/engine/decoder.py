"""The token loop over any number of rows: the next step is under way before the ids of the last one are read.

A step feeds the ids that are not in a row's cache yet, draws an id from the last logits, and works out its
log-probability and the entropy, all as one graph that nobody waits for. `step` starts the step after (fed with the
drawn, still unread ids) and only then reads, so Python's work hides behind the device's. Rows share the pass over the
weights; each has its own cache, processors, sampler and key, so a row draws what it draws alone: exactly where the
backend computes rows alike (on the CPU up to 7 in float32), else up to near-ties.

A prompt is fed as mlx-lm does it (chunks of all but the last id, then the last), so greedy ids are mlx-lm's.

Does not: decide when to stop, know texts, or accept a logit that is not finite (one NaN would become id 0 for ever).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from qwq_mlx.engine.activation_taps import ActivationTaps, look
from qwq_mlx.engine.kv_cache import grow
from qwq_mlx.engine.row import Pending, Row, Token, check_ids
from qwq_mlx.errors import NotFiniteError, OptionError
from qwq_mlx.model.attention import joined
from qwq_mlx.model.blas import uses_blas
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS

__all__ = ["Decoder"]

_T = TypeVar("_T")
_CLEAR_EVERY = 256  # steps between two returns of unused buffers to the system, as in mlx-lm


class Decoder:
    """Feeds rows to one model: `prefill` each, then `step` for one id of each.

    module: mlx_lm's Qwen2.
    n_ids: ids the tokenizer has; rows of the embedding beyond are never drawn.
    reproducible: rows share a pass only as far as the backend computes each as it does alone.
    """

    def __init__(self, module: Any, *, n_ids: int, reproducible: bool = False) -> None:
        self.n_ids = n_ids
        self._module = module
        self._uses_blas = uses_blas(module)
        self._max_rows = (MIN_BLAS_ROWS - 1 if self._uses_blas else 1) if reproducible else None
        self._taps = ActivationTaps(module)

    def prefill(self, row: Row, ids: Sequence[int], *, chunk: int, n_cached: int = 0) -> Iterator[int]:
        """Feed a row's prompt in chunks; yields how many of its ids are in the cache after each. Exhaust it.

        n_cached: how many leading ids the cache holds already. Raises OptionError for ids beyond the vocabulary.
        """
        check_ids(ids, self.n_ids)
        if not 0 <= n_cached < len(ids):
            raise OptionError(f"n_cached is {n_cached}, expected from 0 to {len(ids) - 1}, the prompt's last place.")
        last = len(ids) - 1
        n_done = n_cached
        while n_done < last:
            n_now = min(chunk, last - n_done)
            grow(row.cache, n_now)
            # without the output matrix: only the last id's logits are asked for
            self._module.model(mx.array([list(ids[n_done : n_done + n_now])]), cache=row.cache)
            for layer in row.cache:
                mx.eval(layer.state)  # one by one: the device's queue would hold the intermediates of many layers
            mx.clear_cache()
            n_done += n_now
            yield n_done
        row.start(ids)

    def force(self, row: Row, ids: Sequence[int]) -> None:
        """Append ids that were not drawn to a row. Raises OptionError for ids beyond the vocabulary."""
        check_ids(ids, self.n_ids)
        row.force(list(ids))

    def draw(self, row: Row) -> Token:
        """The next id of one row. Raises its failure where it cannot go on."""
        [token] = self.step([row])
        if token is None:
            assert row.failure is not None, "a row that draws nothing says why"
            raise row.failure
        return token

    def step(self, rows: Sequence[Row]) -> list[Token | None]:
        """Draw the next id of each row; None for a row that cannot go on, whose `failure` says why.

        That is NotFiniteError naming the step where a logit is NaN or infinite, OptionError where a hook returns
        something else than logits, or whatever a hook raised; the other rows are not held up. A failure of MLX in the
        pass itself is raised.
        """
        self._launch_missing(rows)
        current = [(row, row.pending) for row in rows]
        for row in rows:
            row.pending = None
        following = [(row, pending) for row, pending in current if pending is not None and not row.is_at_last]
        for group in self._passes(following):
            fed = mx.stack([pending.id for _, pending in group]).reshape(-1, 1)
            self._launch([row for row, _ in group], fed, [pending.tokens for _, pending in group], n_ahead=1)
        return [None if pending is None else self._read(row, pending) for row, pending in current]

    def _launch_missing(self, rows: Sequence[Row]) -> None:
        """Start a step of the rows that have none under way: those that feed one id together, the others alone."""
        missing = [row for row in rows if row.pending is None and row.failure is None]
        for row in missing:
            self._feed_forced(row)
        single = [row for row in missing if len(row.unfed) == 1]
        for group in self._passes(single) + [[row] for row in missing if len(row.unfed) != 1]:
            tokens = [row.tokens if row.has_processors else None for row in group]
            self._launch(group, mx.array([row.unfed for row in group]), tokens, n_ahead=0)

    def _passes(self, rows: Sequence[_T]) -> list[Sequence[_T]]:
        """The rows that share a pass over the weights."""
        size = self._max_rows or len(rows)
        return [rows[first : first + size] for first in range(0, len(rows), size)] if rows else []

    def _feed_forced(self, row: Row) -> None:
        """Feed injected ids as ids that are drawn are fed, so that a run cut among them goes on to the same bits."""
        if not self._uses_blas:
            return
        while len(row.unfed) > MIN_BLAS_ROWS - 1:
            now, row.unfed = row.unfed[: MIN_BLAS_ROWS - 1], row.unfed[MIN_BLAS_ROWS - 1 :]
            grow(row.cache, len(now))
            self._module.model(mx.array([now]), cache=row.cache)

    def _launch(self, rows: Sequence[Row], fed: Any, tokens: Sequence[Any], *, n_ahead: int) -> None:
        """Build and start one step of each row, with one pass over the weights.

        fed: (rows, n) ids, perhaps unread. tokens: of each row, all ids up to the fed ones. n_ahead: how many of them
        the row has not read yet.
        """
        for row in rows:
            grow(row.cache, fed.shape[1])
        module = self._taps.module({layer for row in rows for layer in row.inspect.hidden_layers})
        logits = module(fed, cache=joined([row.cache for row in rows]))
        for place, row in enumerate(rows):
            own = logits[place, -1, : self.n_ids].astype(mx.float32)
            try:
                row.pending = self._draw(row, place, own, tokens[place], row.n_output + n_ahead)
            except Exception as error:  # noqa: BLE001 - whatever a hook raises; told when this token would be read
                row.failure = error
        self._taps.clear()
        mx.async_eval(  # type: ignore[no-untyped-call]
            *(array for row in rows if row.pending is not None for array in row.pending.arrays())
        )

    def _draw(self, row: Row, place: int, logits: Any, tokens: Any, index: int) -> Pending:
        """One row's step behind its logits, (n_ids,) float32. index: of the output id that it draws."""
        offered, total = row.offered(tokens, logits, index)
        drawn = row.sampler.draw(offered, index)
        log_total = mx.logsumexp(logits)
        # one number shows every logit that is not finite: of -inf the entropy makes 0 * -inf = NaN, the sum -inf
        is_asked = row.inspect.entropy
        second = log_total - (mx.exp(logits - log_total) * logits).sum() if is_asked else logits.sum()
        stats = mx.stack([logits[drawn] - log_total, second])
        after = None if tokens is None else mx.concatenate([tokens, drawn.astype(mx.uint32).reshape(1)])
        hidden = {layer: self._taps.hidden(layer, place) for layer in row.inspect.hidden_layers}
        return Pending(drawn, stats, after, look(row.inspect, logits, log_total, hidden, total))

    def _read(self, row: Row, pending: Pending) -> Token | None:
        """Wait for a row's step and append its id; None where its logits are not finite."""
        logprob, second = pending.stats.tolist()
        if not (math.isfinite(second) and math.isfinite(logprob)):
            row.pending = None
            row.failure = NotFiniteError(
                f"Step {row.n_output:,}: the model's logits hold NaN or infinity, so the ids from here on would mean "
                "nothing. Check the weights (python -m qwq_mlx.verify FOLDER), or convert the source again."
            )
            return None
        seen = None if pending.looking is None else pending.looking.read(row.inspect, row.n_output)
        # rounding may put either on the wrong side of 0 where one id has all the probability
        entropy = max(second, 0.0) if row.inspect.entropy else None
        token = Token(int(pending.id.item()), min(logprob, 0.0), entropy, seen)
        row.add(token.id, pending.tokens)
        if row.n_output % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return token
