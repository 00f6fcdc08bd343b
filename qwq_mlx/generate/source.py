"""Where a run's ids come from: its decoder, and what draws ahead of it where texts are banned.

Does not: feed or draw anything (`run` does).
"""

from __future__ import annotations

from typing import Any

from qwq_mlx.engine.activation_taps import Inspector
from qwq_mlx.engine.bad_words import DrawnAhead, Source
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.language_mask import LanguageGuard, home_scripts
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.generate.request import Setup, given

__all__ = ["decoder_of", "source_of"]


def decoder_of(setup: Setup, cache: list[Any] | None) -> Decoder:
    """The decoder that a setup asks for. cache: an earlier run's, to go on from; None for an empty one."""
    model, pieces, sampling = setup.model, setup.pieces, setup.sampling
    n_ids = model.tokenizer.n_ids
    sampler = Sampler(
        sampling,
        seed=given(sampling.seed),
        n_ids=n_ids,
        breaker_ids=pieces.holding(sampling.dry_breakers) if sampling.dry_multiplier else (),
        guard=LanguageGuard(pieces, home_scripts(setup.question)) if setup.limits.language_guard else None,
    )
    return Decoder(
        model.module,
        sampler,
        n_ids=n_ids,
        cache=cache or new_cache(model.module, setup.plan.workload.kv_bits),
        inspector=None if setup.inspect.is_off else Inspector(setup.inspect, model.module, n_ids=n_ids),
        with_entropy=setup.inspect.entropy,
    )


def source_of(setup: Setup, decoder: Decoder) -> Source:
    """The decoder itself, or what draws ahead of it to look for banned texts."""
    if not setup.limits.banned:
        return decoder
    return DrawnAhead(
        decoder,
        setup.pieces,
        setup.limits.banned,
        stop_ids=setup.model.stop_ids,
        n_most=given(setup.limits.max_tokens),
    )
