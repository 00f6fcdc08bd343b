"""What is settled before a model's weights are read: which folder, what memory there is, and that the run will fit it;
and then they are read.

What is settled will be read, so the system is asked for the shards at the end; in a group each process reads its parts,
and what is settled holds for all of them.

Does not: make a reasoner of it (`reasoner.load` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.default_model import ready_model
from qwq_mlx.engine.ranks.leader import Leader
from qwq_mlx.errors import OptionError
from qwq_mlx.files.read_ahead import read_ahead
from qwq_mlx.generate.drafting import DraftChoice, choose_draft
from qwq_mlx.generate.following import begin_loading, lead, limits_of_ranks, wait_until_loaded
from qwq_mlx.model.device import backend_name, limit_bytes
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import ComputeType, LoadedModel, LoadProgress, default_compute_type, load_model
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED
from qwq_mlx.model.memory.fit import fitted
from qwq_mlx.model.memory.plan import MemoryPlan, Workload
from qwq_mlx.model.memory.splits import choose_split, plan_ranks
from qwq_mlx.model.split import Split, SplitKind
from qwq_mlx.model.template import read_template_file
from qwq_mlx.options import Limits

__all__ = ["LoadPlan", "load_planned", "plan_load"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """folder: of the model. drafts: who drafts. plan: of the process whose memory limits what all can do.
    leader: of the processes that are to hold the model together; None for this one alone. split: who of them holds
    what.
    limits: what the device of each process gives, this one's first; None where nothing is refused.
    peak_bytes: of each process.
    """

    folder: Path
    drafts: DraftChoice
    plan: MemoryPlan
    leader: Leader | None
    split: Split | None
    limits: list[int | None]
    peak_bytes: list[int]


def plan_load(
    folder: str | Path | None,
    limits: Limits,
    *,
    compute_type: ComputeType | None,
    force: bool,
    follow_links: bool,
    reproducible: bool,
    draft: str | Path | None,
    draft_length: int | None,
    group: Any | None,
    split: SplitKind | None,
) -> LoadPlan:
    """Check all that can be checked from headers; the arguments are those of `reasoner.load`.

    Raises what `reasoner.load` raises before it reads a weight.
    """
    if split is not None and (group is None or group.size() == 1):
        raise OptionError(
            f"split is {split!r}, but no other process holds a part of the model. Give `group`, or leave it out."
        )
    model = ready_model(folder)
    leader = None if group is None or group.size() == 1 else lead(group)
    limit = None if force else limit_bytes()
    files = open_model_folder(model, follow_links=follow_links)
    drafts = choose_draft(draft, draft_length, files, reproducible=reproducible, follow_links=follow_links)
    of_ranks: list[int | None] = [limit]
    chosen: Split | None = None
    if leader is not None:
        of_ranks = limits_of_ranks(leader, files.path, limit, follow_links=follow_links)
        workload = _workload(limits, drafts, compute_type)
        chosen = choose_split(files, workload, of_ranks, kind=split, backend=backend_name())
    plan = fitted(
        files,
        limits,
        limit_bytes=limit,
        backend=backend_name(),
        compute_type=compute_type,
        draft=drafts.shape,
        drafts_from_texts=drafts.uses_texts,
        split=chosen,
        of_ranks=of_ranks,
    ).plan
    if leader is None:
        read_ahead(shard.path for shard in files.checkpoint.shards)
    plans = [plan]
    if chosen is not None:
        plans = plan_ranks(files, plan.workload, chosen, of_ranks, backend=backend_name())
    return LoadPlan(
        folder=model,
        drafts=drafts,
        plan=plan,
        leader=leader,
        split=chosen,
        limits=of_ranks,
        peak_bytes=[each.peak_bytes for each in plans],
    )


def _workload(limits: Limits, drafts: DraftChoice, compute_type: ComputeType | None) -> Workload:
    """What is planned to find out who holds what; kv_bits "auto" begins with a plain cache."""
    return Workload(
        context=limits.context,
        kv_bits=None if limits.kv_bits == "auto" else limits.kv_bits,
        prefill_step=limits.prefill_step,
        compute_type=compute_type,
        draft=drafts.shape,
        drafts_from_texts=drafts.uses_texts,
        n_draft=MAX_DRAFTED,
    )


def load_planned(
    plan: LoadPlan,
    *,
    compute_type: ComputeType | None,
    chat_template: str | Path | None,
    follow_links: bool,
    reproducible: bool,
    verify: bool,
    progress: LoadProgress | None,
) -> LoadedModel:
    """Read the weights, and let the other processes read their parts; the arguments are those of `reasoner.load`.

    Raises what that raises.
    """
    template, leader = None if chat_template is None else read_template_file(Path(chat_template)), plan.leader
    if leader is not None:
        assert plan.split is not None, "they hold it together"
        begin_loading(
            leader,
            plan.split,
            compute_type=compute_type or default_compute_type(),  # of all: they add up what they compute
            follow_links=follow_links,
            reproducible=reproducible,
            verify=verify,
            peak_bytes=plan.peak_bytes,
        )
    model = load_model(
        plan.folder,
        compute_type=compute_type,
        chat_template=template,
        follow_links=follow_links,
        reproducible=reproducible,
        group=None if leader is None else leader.group,
        split=plan.split,
        progress=progress,
    )
    if leader is not None:
        wait_until_loaded(leader, plan.peak_bytes[0])
        model.module.leader = leader
        model.module.ranks.limits = plan.limits
    return model
