"""Drafts by a small model of the same vocabulary, drawn with the noise of the rows that they are for.

Draft and model draw the same id where both find it likely (coupled draws), which at a temperature above 0 is more often
than two independent draws agree. A row's processors change the drafts' logits too, and its penalties, bans and masks
hold; their state is put back afterwards. Each row has a cache of its own in the draft model, kept in step by cutting it
back to the ids that row and drafts share.

Does not: check that the vocabularies agree (`load_draft` does), or know how long a draft pays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from qwq_mlx.engine.drafters.suffix_automaton import Guess
from qwq_mlx.engine.kv_cache import grow, new_cache
from qwq_mlx.engine.logits_processors import Incremental
from qwq_mlx.engine.model_runner import run_pass
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import draw_rows
from qwq_mlx.model.rotations import rotations_in_place

__all__ = ["RAGGED", "ModelDrafter"]

_N_KINDS = 10  # steps of the draft model's own probability in which its drafts are trusted alike
_PRIOR = 0.7  # right of 1, before anything was learnt
_KEEP = 0.99  # of what was counted, at each further draft
RAGGED = 8
"""Ids of a row that the first pass of a draft may feed together with the other rows."""

_FED_BY_FEW = 8 * RAGGED  # ids: eight such passes take less than one by unpacked matrices, by estimate


@dataclass(slots=True)
class _Text:
    """A row's cache in the draft model, and the ids that it holds."""

    cache: list[Any]
    ids: list[int] = field(default_factory=list)


class ModelDrafter:
    """Guesses by a model, mlx_lm's Qwen2.

    n_ids: ids the tokenizer has. chunk: prompt ids fed at a time. kv_bits: of its caches, None for plain ones.
    context: positions the draft model has; behind them it drafts nothing.
    """

    name = "model"

    def __init__(self, module: Any, *, n_ids: int, chunk: int, context: int, kv_bits: int | None = None) -> None:
        self._module = module
        self._n_ids, self._chunk, self._context, self._kv_bits = n_ids, chunk, context, kv_bits
        self._batches_from = None if mx.default_device().type == mx.cpu else 1
        self._texts: WeakKeyDictionary[Row, _Text] = WeakKeyDictionary()
        self._trust: dict[int, tuple[float, float]] = {}  # kind -> right ones and all
        self._by_place: dict[int, tuple[float, float]] = {}  # place -> the same, before a draft is made

    def expected(self, n_most: int) -> list[float]:
        """The probability that each of the next n_most ids is right where those before are, before they are drafted."""
        shares = []
        for place in range(n_most):
            right, total = self._by_place.get(place, (_PRIOR, 1.0))
            shares.append(right / total)
        return shares

    def forget(self) -> None:
        """Expect what was expected before anything was learnt, so that it is tried again."""
        self._by_place.clear()

    def learn(self, guesses: Sequence[Guess], n_right: int) -> None:
        """Take how many of the leading ones, as `guess` gave them, were right."""
        for place, guess in enumerate(guesses[: n_right + 1]):
            is_right = place < n_right
            for counted, key, prior in ((self._trust, guess.kind, guess.probability), (self._by_place, place, _PRIOR)):
                right, total = counted.get(key, (prior, 1.0))
                counted[key] = right * _KEEP + is_right, total * _KEEP + 1.0

    def lags(self, row: Row) -> bool:
        """Whether a row has more ids that were not read than its first pass may feed."""
        text = self._texts.get(row)
        return len(row.ids) - (0 if text is None else len(text.ids)) > RAGGED

    def guess(self, rows: Sequence[Row], n_each: Sequence[int]) -> list[list[Guess]]:
        """How each row goes on, n_each ids, with one pass over the draft model's weights for each place."""
        asked = [
            (row, n)
            for row, n in zip(rows, n_each, strict=True)
            if n > 0 and len(row.ids) + n <= self._context and row.ids
        ]
        drafted = self._drafted(asked) if asked else {}
        return [drafted.get(row, []) for row in rows]

    def _drafted(self, asked: Sequence[tuple[Row, int]]) -> dict[Row, list[Guess]]:
        for row in [each for each in self._texts if not (each.cache and each.may_draft)]:
            del self._texts[row]  # it has ended, and who keeps it would keep its cache here, too
        texts = {row: self._text(row) for row, _ in asked}
        before = {row: row.states() for row, _ in asked}
        ids: dict[Row, list[Any]] = {row: [] for row, _ in asked}
        shares: dict[Row, list[Any]] = {row: [] for row, _ in asked}
        missing = [row.ids[len(texts[row].ids) :] for row, _ in asked]
        fed = mx.array([[token_id] for each in missing for token_id in each])
        n_fed, drafting = [len(each) for each in missing], list(asked)
        for place in range(max(n for _, n in asked)):
            caches = [texts[row].cache for row, _ in drafting]
            logits = run_pass(self._module, fed, caches, n_fed, batches_from=self._batches_from)
            ends = mx.array([end - 1 for end in itertools.accumulate(n_fed)])
            drawn, probable = self._draw([row for row, _ in drafting], logits[ends, -1], ids)
            for n_row, (row, _) in enumerate(drafting):
                ids[row].append(drawn[n_row])
                shares[row].append(probable[n_row])
            drafting = [(row, n) for row, n in drafting if n > place + 1]
            if not drafting:
                break
            fed, n_fed = mx.stack([ids[row][-1] for row, _ in drafting]).reshape(-1, 1), [1] * len(drafting)
        for row, _ in asked:
            for place, state in before[row].items():
                processor = row.processors[place]
                assert isinstance(processor, Incremental), "it gave the state"
                processor.restore(state)
        mx.eval([*ids.values(), *shares.values()])
        return {row: self._read(row, texts[row], ids[row], shares[row]) for row, _ in asked}

    def _draw(self, rows: Sequence[Row], logits: Any, drafted: Mapping[Row, Sequence[Any]]) -> tuple[Any, Any]:
        """A draw of each row behind what was drafted, and its share in the draft model's distribution; unread.

        logits: (rows, vocab). Returns (rows,) each.
        """
        logits = logits[:, : self._n_ids].astype(mx.float32)
        offered, indices = [], [row.n_output + len(drafted[row]) for row in rows]
        for place, (row, index) in enumerate(zip(rows, indices, strict=True)):
            tokens = row.tokens
            if drafted[row] and row.has_processors:
                tokens = mx.concatenate([tokens, mx.stack(list(drafted[row])).astype(mx.uint32)])
            offered.append(row.offered(tokens, logits[place], index)[0] if row.has_processors else None)
        if any(each is not None for each in offered):
            stacked = mx.stack([logits[place] if each is None else each for place, each in enumerate(offered)])
        else:
            stacked = logits
        drawn = draw_rows([row.sampler for row in rows], stacked, indices)
        own = mx.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
        return drawn, mx.exp(own - mx.logsumexp(logits, axis=-1))

    def _read(self, row: Row, text: _Text, ids: Sequence[Any], shares: Sequence[Any]) -> list[Guess]:
        guesses = []
        for drawn, share in zip(ids, shares, strict=True):
            kind = min(int(_N_KINDS * share.item()), _N_KINDS - 1)
            right, total = self._trust.get(kind, (share.item(), 1.0))
            guesses.append(Guess(int(drawn.item()), right / total, kind))
        text.ids = [*row.ids, *(guess.id for guess in guesses[:-1])]  # the last one was not fed
        return guesses

    def _text(self, row: Row) -> _Text:
        """A row's cache, which lacks a few of its ids at most, and its last one."""
        text = self._texts.get(row)
        if text is None:
            text = self._texts[row] = _Text(new_cache(self._module, self._kv_bits))
        known = min(len(text.ids), len(row.ids) - 1)
        n_same = known
        if text.ids[:known] != row.ids[:known]:
            n_same = next(place for place in range(known) if text.ids[place] != row.ids[place])
        for layer in text.cache:
            layer.trim(layer.offset - n_same)
        del text.ids[n_same:]
        while len(row.ids) - len(text.ids) > RAGGED:
            self._feed(text, row.ids[len(text.ids) : len(row.ids) - 1])
        return text

    def _feed(self, text: _Text, missing: list[int]) -> None:
        """Feed the next of a row's ids; in place as many as a pass drafts with, for CUDA compiles kernels for more, and
        of few more the matrices would be unpacked."""
        is_in_place = self._kv_bits is None and rotations_in_place(self._module) is not None
        if is_in_place and len(missing) <= _FED_BY_FEW:
            now = missing[:RAGGED]
            run_pass(self._module, mx.array([now]), [text.cache], [len(now)], batches_from=self._batches_from)
        else:
            now = missing[: self._chunk]
            grow(text.cache, len(now))
            self._module.model(mx.array([now]), cache=text.cache)
            for layer in text.cache:
                mx.eval(layer.state)
        text.ids += now
