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

from qwq_mlx.engine.drawing import Place, draw_places, ids_of
from qwq_mlx.engine.model_runner import ModelRunner
from qwq_mlx.engine.row import Pending, ProcessorStates, Ready, Row, Token, check_ids
from qwq_mlx.engine.speculative import Draft, Drafts, Verification, n_accepted
from qwq_mlx.errors import NotFiniteError, OptionError
from qwq_mlx.model.blas import uses_blas
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.products import most_rows_alike

__all__ = ["Decoder"]

_T = TypeVar("_T")
_CLEAR_EVERY = 256  # steps between two returns of unused buffers to the system, as in mlx-lm


class Decoder:
    """Feeds rows to one model: `prefill` each, then `step` for one id of each.

    module: mlx_lm's Qwen2.
    n_ids: ids the tokenizer has; rows of the embedding beyond are never drawn.
    reproducible: rows share a pass only as far as the backend computes each as it does alone.
    drafts: guesses ids that a pass then checks; None feeds one id of a row in a pass.
    is_stopped: somebody stopped another of the processes that hold the model, which is to stop all.
    """

    def __init__(self, module: Any, *, n_ids: int, reproducible: bool = False, drafts: Drafts | None = None) -> None:
        self.n_ids = n_ids
        self._uses_blas = uses_blas(module)
        self._max_rows = most_rows_alike(module) if reproducible else None
        self._runner = ModelRunner(module, reproducible=reproducible)
        self._drafts = drafts
        self.is_stopped = False

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
            self._runner.prefill(row.cache, ids[n_done : n_done + n_now])
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
        pass itself is raised. A row whose drafts were right has tokens ready, and takes no part in the pass.
        """
        waiting = [row for row in rows if not row.ready]
        verifications = self._launch_missing(waiting)
        current = [(row, row.pending) for row in waiting if row.pending is not None]
        for row in waiting:
            row.pending = None
        following = self._undrafted([(row, pending) for row, pending in current if not row.is_at_last])
        for group in self._passes(following):
            fed: mx.array = ids_of([pending for _, pending in group]).reshape(-1, 1)
            self._launch([row for row, _ in group], fed, [pending.tokens for _, pending in group], n_ahead=1)
        for row, pending in current:
            row.ready.append(self._read(row, pending, row.n_output))
        for verification in verifications:
            self._accept(verification)
        self.is_stopped = self.is_stopped or self._runner.take_stop()
        tokens = [row.take() if row.ready else None for row in rows]
        if any(row.n_output % _CLEAR_EVERY == 0 for row in rows):
            mx.clear_cache()
        return tokens

    def take_stop(self) -> bool:
        """Whether somebody stopped another process since the last call; rows that come from now on are not stopped."""
        was_stopped = self._runner.take_stop() or self.is_stopped
        self.is_stopped = False
        return was_stopped

    def _launch_missing(self, rows: Sequence[Row]) -> list[Verification]:
        """Start a step of the rows that have none under way; returns the passes that check drafts.

        Rows that feed one id, and drafts behind it, share a pass; the others go alone.
        """
        missing = [row for row in rows if row.pending is None and row.failure is None]
        for row in missing:
            self._feed_forced(row)
        single = [row for row in missing if len(row.unfed) == 1]
        for row in (row for row in missing if len(row.unfed) != 1):
            self._launch([row], [row.unfed], [self._tokens(row)], n_ahead=0)
        verifications: list[Verification] = []
        for group in self._passes(single):
            drafts = self._drafted(group)
            if any(draft.ids for draft in drafts):
                verifications += self._verify(group, drafts)
            else:
                self._launch(group, [row.unfed for row in group], [self._tokens(row) for row in group], n_ahead=0)
        return verifications

    def _undrafted(self, following: list[tuple[Row, Pending]]) -> list[tuple[Row, Pending]]:
        """Those whose next step begins before their ids are read: all of them, or none where drafts are due."""
        may_draft = [] if self._drafts is None else [row for row, _ in following if row.most_drafts]
        if self._drafts is None or not may_draft or not self._drafts.is_due(may_draft):
            return following
        return []

    def _drafted(self, rows: Sequence[Row]) -> list[Draft]:
        """What is guessed for each row, no more than may share the pass with them."""
        # with more ids than that in a pass, the CPU would round otherwise than it does for one
        most_fed = MIN_BLAS_ROWS - 1 if self._uses_blas else self._max_rows
        most = None if most_fed is None else most_fed - len(rows)
        if self._drafts is None or (most is not None and most < 1):
            return [Draft()] * len(rows)
        return self._drafts.draft(rows, most=most)

    def _tokens(self, row: Row) -> Any | None:
        return row.tokens if row.has_processors else None

    def _verify(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> list[Verification]:
        """Start one pass over the last id of each row and its draft, and the draws at every place."""
        fed = [[*row.unfed, *draft.ids] for row, draft in zip(rows, drafts, strict=True)]
        logits = self._runner.logits(
            [row.cache for row in rows],
            [[token_id] for ids in fed for token_id in ids],
            [len(ids) for ids in fed],
            hidden_layers=_hidden_layers(rows),
        )
        drawn = self._draw(self._places(rows, drafts), logits)
        verifications = []
        for row, draft in zip(rows, drafts, strict=True):
            own, drawn = drawn[: 1 + len(draft.ids)], drawn[1 + len(draft.ids) :]
            if draft.ids:
                verifications.append(_verification(row, draft, own))
            else:
                _give(row, own[0][0])
        self._start(rows, verifications)
        return verifications

    def _places(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> list[Place]:
        """Where ids are drawn in a pass over each row's last id and its draft."""
        places: list[Place] = []
        for row, draft in zip(rows, drafts, strict=True):
            known = self._tokens(row)
            for place in range(1 + len(draft.ids)):
                tokens = known
                if known is not None and place:
                    tokens = mx.concatenate([known, mx.array(draft.ids[:place], mx.uint32)])
                places.append(Place(row, len(places), tokens, row.n_output + place))
        return places

    def _accept(self, verification: Verification) -> None:
        """Read a checked draft: its row has the ids ready that the model drew, up to the first that is not the draft's.

        That one is the model's own draw behind right ids, so it is among them.
        """
        row, draft, draws, states = verification
        read: list[Ready] = []
        for place, (pending, state) in enumerate(zip(draws, states, strict=True)):
            read.append(self._read(row, pending, row.n_output + place)._replace(states=state))
        n = n_accepted(draft.ids, read)
        row.cut_cache(len(row.ids) + n)
        row.ready.extend(read[: n + 1])
        row.count_draft(draft.source, len(draft.ids), n)
        if self._drafts is not None:
            self._drafts.learn(row, draft, n)

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
            self._runner.prefill(row.cache, now)

    def _launch(
        self, rows: Sequence[Row], fed: Sequence[Sequence[int]] | mx.array, tokens: Sequence[Any], *, n_ahead: int
    ) -> None:
        """Build and start one step of each row, with one pass over the weights.

        fed: (rows, n) ids; an array may be unread. tokens: of each row, all ids up to the fed ones. n_ahead: how many
        of them the row has not read yet.
        """
        n_each = [fed.shape[1] if isinstance(fed, mx.array) else len(fed[0])] * len(rows)
        caches = [row.cache for row in rows]
        logits = self._runner.logits(caches, fed, n_each, hidden_layers=_hidden_layers(rows))
        places = [Place(row, place, tokens[place], row.n_output + n_ahead) for place, row in enumerate(rows)]
        for row, (drawn, _) in zip(rows, self._draw(places, logits), strict=True):
            _give(row, drawn)
        self._start(rows)

    def _draw(self, places: Sequence[Place], logits: Any) -> list[tuple[Pending | Exception, ProcessorStates]]:
        """Draw at all places of a pass. logits: (places, vocab)."""
        logits = logits[:, : self.n_ids].astype(mx.float32)
        are_alike = self._max_rows is None or self._uses_blas
        are_computed = self._uses_blas and len(places) >= MIN_BLAS_ROWS  # BLAS gave them
        drawn = draw_places(places, logits, taps=self._runner.taps, are_alike=are_alike, are_computed=are_computed)
        self._runner.taps.clear()
        return drawn

    def _start(self, rows: Sequence[Row], verifications: Sequence[Verification] = ()) -> None:
        """Let the device begin with what was built."""
        pending = [row.pending for row in rows if row.pending is not None]
        pending += [each for verification in verifications for each in verification.draws]
        self._runner.start([array for each in pending for array in each.arrays()])

    def _read(self, row: Row, pending: Pending, index: int) -> Ready:
        """Wait for a draw of a row; a failure where its logits are not finite. index: of the output id."""
        with self._runner.waiting():
            ids, stats = pending.drawn.read()
        logprob, second = stats[pending.place]
        if not (math.isfinite(second) and math.isfinite(logprob)):
            return Ready(
                NotFiniteError(
                    f"Step {index:,}: the model's logits hold NaN or infinity, so the ids from here on would mean "
                    "nothing. Check the weights (python -m qwq_mlx.verify FOLDER), or convert the source again."
                )
            )
        seen = None if pending.looking is None else pending.looking.read(row.inspect, index)
        # rounding may put either on the wrong side of 0 where one id has all the probability
        entropy = max(second, 0.0) if row.inspect.entropy else None
        return Ready(Token(ids[pending.place], min(logprob, 0.0), entropy, seen), pending.tokens)


def _hidden_layers(rows: Sequence[Row]) -> set[int]:
    return {layer for row in rows for layer in row.inspect.hidden_layers}


def _give(row: Row, drawn: Pending | Exception) -> None:
    """Give a row its step, or the failure of one of its hooks."""
    if isinstance(drawn, Exception):
        row.failure = drawn
    else:
        row.pending = drawn


def _verification(row: Row, draft: Draft, drawn: Sequence[tuple[Pending | Exception, ProcessorStates]]) -> Verification:
    """A draft with the draws at its places. Raises what a processor raised, for a row with hooks has no drafts."""
    draws = []
    for pending, _ in drawn:
        if isinstance(pending, Exception):
            raise pending
        draws.append(pending)
    return Verification(row, draft, draws, [states for _, states in drawn])
