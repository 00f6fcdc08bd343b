"""Positions become the few numbers that a person reads, and the tokens where the models differ most.

Everything here is a function of the measured positions, rounded to six digits. The same folders and text give the same
record on the same machine, in every process; another number of BLAS threads, or another backend, changes KL by some
1e-9 nats.

Does not: run models, or say what is good enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.model.tokenizer import LoadedTokenizer
from qwq_mlx.quality.measure import Measured
from qwq_mlx.quality.text import QualityText

__all__ = ["KL_EDGES", "Quality", "WorstToken", "summarise"]

KL_EDGES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Where the bins of `Quality.kl_histogram` end, in nats; one more bin holds what is beyond."""

_N_WORST = 12
_CONTEXT_IDS = 16  # shown before a worst token: about a line


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A token at which the two distributions differ much.

    kl: nats. window, position: where it stands in the text. context: the text before it. next: what the text has there.
    reference, model: each model's most likely token; reference_p, model_p: its own probability for it.
    """

    kl: float
    window: int
    position: int
    context: str
    next: str
    reference: str
    reference_p: float
    model: str
    model_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a model lost against a reference on a text.

    text, text_sha256: the file's name and digest; n_positions: ids run; n_tokens: ids measured.
    kl: mean KL(reference || model) in nats, and its median, 99th percentile and largest value.
    kl_histogram: tokens with a KL up to each of KL_EDGES and above the edge before; the last count is beyond all.
    top1_agreement: share of tokens for which both models find the same id most likely.
    reference_perplexity, perplexity: exp of the mean surprise at the text's own next token.
    drift: relative error of the hidden states, after the embedding and after each layer (see `Measured`).
    worst: tokens of the largest KL, worst first.
    """

    text: str
    text_sha256: str
    n_positions: int
    n_tokens: int
    kl: float
    kl_median: float
    kl_p99: float
    kl_max: float
    kl_histogram: tuple[int, ...]
    top1_agreement: float
    reference_perplexity: float
    perplexity: float
    drift: tuple[float, ...]
    worst: tuple[WorstToken, ...]

    def as_mapping(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def summarise(measured: Measured, text: QualityText, tokenizer: LoadedTokenizer) -> Quality:
    """The numbers of one model."""
    kl = _all(measured, "kl")
    agree = _all(measured, "top") == _all(measured, "reference_top")
    return Quality(
        text=text.name,
        text_sha256=text.sha256,
        n_positions=text.n_positions,
        n_tokens=text.n_tokens,
        kl=_round(kl.mean()),
        kl_median=_round(np.median(kl)),
        kl_p99=_round(np.percentile(kl, 99)),
        kl_max=_round(kl.max()),
        kl_histogram=tuple(np.bincount(np.searchsorted(KL_EDGES, kl), minlength=len(KL_EDGES) + 1).tolist()),
        top1_agreement=_round(agree.mean()),
        reference_perplexity=_round(np.exp(-_all(measured, "reference_logprob").mean())),
        perplexity=_round(np.exp(-_all(measured, "logprob").mean())),
        drift=tuple(_round(each) for each in measured.drift),
        worst=tuple(_worst(measured, text, tokenizer)),
    )


def _all(measured: Measured, name: str) -> NDArray[Any]:
    return np.concatenate([getattr(window, name) for window in measured.windows])


def _worst(measured: Measured, text: QualityText, tokenizer: LoadedTokenizer) -> Sequence[WorstToken]:
    places = [(window, place) for window, each in enumerate(measured.windows) for place in range(len(each.kl))]
    places.sort(key=lambda at: (-measured.windows[at[0]].kl[at[1]], at))

    def spoken(ids: Sequence[int]) -> str:
        return str(tokenizer.hf.decode(list(ids), skip_special_tokens=False))

    def token(window: int, place: int) -> WorstToken:
        each, ids = measured.windows[window], text.windows[window].ids
        position = text.windows[window].first + place
        return WorstToken(
            kl=_round(each.kl[place]),
            window=window,
            position=position,
            context=spoken(ids[max(0, position - _CONTEXT_IDS) : position]),
            next=spoken(ids[position : position + 1]),
            reference=spoken([int(each.reference_top[place])]),
            reference_p=_round(each.reference_top_p[place]),
            model=spoken([int(each.top[place])]),
            model_p=_round(each.top_p[place]),
        )

    return [token(*at) for at in places[:_N_WORST]]


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")
