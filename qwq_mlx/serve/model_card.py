"""What clients may know of the model that is served.

Does not: read the model (`prepare` does).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ModelCard"]


class ModelCard(NamedTuple):
    """What clients may know of the model.

    name: as clients call it.
    weights: in words.
    digest: sha256 of names and sizes of its files.
    identity: by which it is known whether a run is its own: digest of the manifest where there is one, else `digest`.
    modified_s: when its folder was changed, in seconds since 1970.
    context: positions of one request.
    width: requests side by side.
    has_tags: it closes its thinking with a tag.
    """

    name: str
    weights: str
    weights_bytes: int
    n_parameters: int
    digest: str
    identity: str
    modified_s: float
    template: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_size: int
    vocab_size: int
    context: int
    width: int
    has_tags: bool
