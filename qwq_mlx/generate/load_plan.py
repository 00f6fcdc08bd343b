"""What is settled before a model's weights are read: which folder, what memory there is, and that the run will fit it.

What is settled will be read, so the system is asked for the shards at the end; in a group each process reads its parts.

Does not: load anything (`reasoner.load` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.default_model import ready_model
from qwq_mlx.errors import OptionError
from qwq_mlx.files.read_ahead import read_ahead
from qwq_mlx.generate.drafting import DraftChoice, choose_draft
from qwq_mlx.model.device import backend_name, limit_bytes
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.memory.fit import fitted
from qwq_mlx.model.ranks import Ranks
from qwq_mlx.options import Limits

__all__ = ["LoadPlan", "plan_load"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """folder: of the model. limit_bytes: what the device gives, None where nothing is refused. drafts: who drafts."""

    folder: Path
    limit_bytes: int | None
    drafts: DraftChoice


def plan_load(
    folder: str | Path | None,
    limits: Limits,
    *,
    compute_type: str | None,
    force: bool,
    follow_links: bool,
    reproducible: bool,
    draft: str | Path | None,
    draft_length: int | None,
    group: Any | None,
) -> LoadPlan:
    """Check all that can be checked from headers; the arguments are those of `reasoner.load`.

    Raises what `reasoner.load` raises before it reads a weight.
    """
    model = ready_model(folder)
    ranks = None if group is None else Ranks(group)
    if ranks is not None and draft not in (None, "off"):
        raise OptionError(
            "draft and group do not go together yet: each process would draft as many ids as its own measurements "
            "say. Leave one of them out."
        )
    limit = None if force else limit_bytes()
    if ranks is not None and limit is not None:
        limit = ranks.smallest(limit)
    files = open_model_folder(model, follow_links=follow_links)
    drafts = choose_draft(draft, draft_length, files, reproducible=reproducible, follow_links=follow_links)
    fitted(
        files,
        limits,
        limit_bytes=limit,
        backend=backend_name(),
        compute_type=compute_type,
        draft=drafts.shape,
        drafts_from_texts=drafts.uses_texts,
        n_ranks=1 if ranks is None else ranks.size,
    )
    if ranks is None:
        read_ahead(shard.path for shard in files.checkpoint.shards)
    return LoadPlan(folder=model, limit_bytes=limit, drafts=drafts)
