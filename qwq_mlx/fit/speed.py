"""How long a token takes on several Macs: the weights that each reads, and what they wait for one another.

Decoding reads every weight once a token, but of the embedding a row alone, so memory is what it waits for. In a tensor
split all Macs read at the same time and sum twice a layer; in a pipeline they read one after another and send once
between two of them.

Does not: count arithmetic, or what a long context reads of the cache; so it compares splits, and predicts no rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwq_mlx.errors import OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.link_speed import LinkSpeed
from qwq_mlx.model.split import Split

__all__ = ["breakeven_s", "link_text", "parse_link", "token_s"]

_SUMS_A_LAYER = 2
_FLOAT_BYTES = 2
_LINK = re.compile(r"(\d+(?:\.\d+)?)us,(\d+(?:\.\d+)?)GB/s")


def parse_link(text: str) -> LinkSpeed:
    """The link of --link. Raises OptionError.

    >>> parse_link("52us,3.1GB/s").seconds(10_240)
    5.2e-05
    """
    match = _LINK.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) < 1e7 or not 0 < float(match[2]) < 1e5:
        raise OptionError(
            f"link is {text!r}, expected MICROSECONDSus,RATEGB/s as --measure-link prints it: 52us,3.1GB/s."
        )
    return LinkSpeed(latency_s=float(match[1]) / 1e6, bytes_per_s=float(match[2]) * 1e9)


def link_text(link: LinkSpeed) -> str:
    """As `parse_link` reads it."""
    return f"{link.latency_s * 1e6:.0f}us,{link.bytes_per_s / 1e9:.2f}GB/s"


def token_s(
    split: Split, read_bytes: Sequence[int], bytes_per_s: Sequence[float], config: Qwen2Config, link: LinkSpeed | None
) -> float:
    """Seconds of a token. read_bytes: by each Mac for a token, of its memory, which gives bytes_per_s. link: None is
    one that takes no time."""
    reading = [n_bytes / rate for n_bytes, rate in zip(read_bytes, bytes_per_s, strict=True)]
    message = 0.0 if link is None else link.seconds(config.hidden_size * _FLOAT_BYTES)
    if split.kind == "tensor":
        return max(reading) + _SUMS_A_LAYER * config.num_hidden_layers * message
    return sum(reading) + (split.n_ranks - 1) * message


def breakeven_s(tensor_s: float, pipeline_s: float, config: Qwen2Config, n_ranks: int) -> float:
    """What a sum may take at most for a tensor split to be as fast as a pipeline. Both without a link's time."""
    return (pipeline_s - tensor_s) / (_SUMS_A_LAYER * config.num_hidden_layers - (n_ranks - 1))
