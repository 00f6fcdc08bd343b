"""The draws of a pass, all places at once: ids, log-probabilities, entropies.

What a place's processors change is worked out for each place; the draws and their statistics are then one set of
operations over all of them, so that a pass over 32 rows makes about as many launches as a pass over one.

Does not: run the model, or read what was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from qwq_mlx.engine.activation_taps import ActivationTaps, look
from qwq_mlx.engine.row import Drawn, Pending, ProcessorStates, Row
from qwq_mlx.engine.sampler import compiled_on_cpu, draw_rows

__all__ = ["Place", "draw_places", "ids_of"]


class Place(NamedTuple):
    """Where an id is drawn.

    row: that it is for. at: its place in the pass. tokens: all ids of the row before it, None where nothing asks.
    output_index: of the output id that it is.
    """

    row: Row
    at: int
    tokens: Any | None
    output_index: int


class _Offer(NamedTuple):
    """What a place's processors made of its logits. changed: None where nothing looks at them. total: of the hooks.

    states: what the processors know there.
    """

    changed: Any | None
    total: Any | None
    states: ProcessorStates


def draw_places(
    places: Sequence[Place],
    logits: Any,
    *,
    taps: ActivationTaps,
    are_alike: bool = True,
    are_computed: bool = False,
) -> list[tuple[Pending | Exception, ProcessorStates]]:
    """Draw at each place, in order; unread. Also what its row's processors then know.

    logits: (places, n_ids) float32. are_alike: rows may be drawn together, whose last bits a GPU may then round
    otherwise. are_computed: nobody waits for the logits any more, so their statistics come from numpy, on the CPU.
    Whatever a hook raises stands in its place; the others are not held up.
    """
    offers = [_offered(place, logits, at) for at, place in enumerate(places)]
    groups: dict[Any, list[int]] = {}
    for at, (place, offer) in enumerate(zip(places, offers, strict=True)):
        if not isinstance(offer, Exception):
            groups.setdefault(place.row.inspect.entropy if are_alike else at, []).append(at)
    drawn: dict[int, Pending | Exception] = {at: each for at, each in enumerate(offers) if isinstance(each, Exception)}
    for group in groups.values():
        drawn.update(_draw_group(group, places, offers, logits, taps, are_computed=are_computed))
    return [(drawn[at], {} if isinstance(offer, Exception) else offer.states) for at, offer in enumerate(offers)]


def ids_of(pending: Sequence[Pending]) -> Any:
    """The ids of steps under way, (n,) uint32, unread."""
    drawn = pending[0].drawn
    if any(each.drawn is not drawn for each in pending):
        return mx.stack([each.id for each in pending])
    places = [each.place for each in pending]
    return drawn.ids if places == list(range(drawn.ids.size)) else drawn.ids[mx.array(places)]


def _offered(place: Place, logits: Any, at: int) -> _Offer | Exception:
    row = place.row
    if not row.has_processors:
        return _Offer(None, None, {})
    try:
        changed, total = row.offered(place.tokens, logits[at], place.output_index)
    except Exception as error:  # noqa: BLE001 - whatever a hook raises; told when this token would be read
        return error
    return _Offer(changed, total, row.states())


def _draw_group(
    group: Sequence[int],
    places: Sequence[Place],
    offers: Sequence[Any],
    logits: Any,
    taps: ActivationTaps,
    *,
    are_computed: bool,
) -> dict[int, Pending]:
    """The draws of places whose rows all ask for entropies, or none of them. group: of places, in order."""
    own = logits if len(group) == len(places) else logits[mx.array(list(group))]
    changed = [offers[at].changed for at in group]
    offered = own
    if any(each is not None for each in changed):
        offered = mx.stack([own[n] if each is None else each for n, each in enumerate(changed)])
    drawn = draw_rows([places[at].row.sampler for at in group], offered, [places[at].output_index for at in group])
    has_entropy = places[group[0]].row.inspect.entropy
    if are_computed:
        log_total, stats = _by_numpy(own, drawn, has_entropy=has_entropy)
    else:
        log_total, stats = (_with_entropy if has_entropy else _with_sum)(own, drawn)
    together = Drawn(drawn, stats)
    return {at: _pending(places[at], offers[at], together, n, own, log_total, taps) for n, at in enumerate(group)}


# One number beside the log-probability shows every logit that is not finite: of -inf the entropy makes 0 * -inf = NaN,
# and the sum is -inf.
@compiled_on_cpu
def _with_entropy(logits: Any, drawn: Any) -> tuple[Any, Any]:
    """The logsumexp of each row, (rows, 1), and its drawn id's log-probability beside the entropy, (rows, 2)."""
    log_total = mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = log_total[:, 0] - (mx.exp(logits - log_total) * logits).sum(axis=-1)
    return log_total, mx.stack([_logprob(logits, drawn, log_total), entropy], axis=-1)


@compiled_on_cpu
def _with_sum(logits: Any, drawn: Any) -> tuple[Any, Any]:
    """The same with the sum of the logits in place of the entropy."""
    log_total = mx.logsumexp(logits, axis=-1, keepdims=True)
    return log_total, mx.stack([_logprob(logits, drawn, log_total), logits.sum(axis=-1)], axis=-1)


def _by_numpy(logits: Any, drawn: Any, *, has_entropy: bool) -> tuple[Any, Any]:
    """What `_with_entropy` or `_with_sum` gives, up to rounding; MLX 0.32.4 takes 20 times as long for an `exp`."""
    rows = np.asarray(logits)
    with np.errstate(invalid="ignore"):  # a NaN, or an infinity, shows in the numbers
        largest = rows.max(axis=-1, keepdims=True)
        weights = np.exp(rows - largest)
        total = weights.sum(axis=-1, keepdims=True)
        log_total = largest + np.log(total)
        if has_entropy:
            weights *= rows
            second = (log_total - weights.sum(axis=-1, keepdims=True) / total)[:, 0]
        else:
            second = rows.sum(axis=-1)
    in_mlx = mx.array(log_total)
    return in_mlx, mx.stack([_logprob(logits, drawn, in_mlx), mx.array(second)], axis=-1)


def _logprob(logits: Any, drawn: Any, log_total: Any) -> Any:
    return (mx.take_along_axis(logits, drawn[:, None], axis=-1) - log_total)[:, 0]


def _pending(
    place: Place, offer: _Offer, drawn: Drawn, n: int, logits: Any, log_total: Any, taps: ActivationTaps
) -> Pending:
    """The draw of one place, the n-th of a group."""
    inspect = place.row.inspect
    after = None
    if place.tokens is not None:
        after = mx.concatenate([place.tokens, drawn.ids[n : n + 1].astype(mx.uint32)])
    hidden = {layer: taps.hidden(layer, place.at) for layer in inspect.hidden_layers}
    seen = None
    if inspect.top_k or hidden or offer.total is not None:
        seen = look(inspect, logits[n], log_total[n, 0], hidden, offer.total)
    return Pending(drawn, n, after, seen)
