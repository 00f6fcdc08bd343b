"""`python -m qwq_mlx.fit`: whether a model fits a machine's memory, with the arithmetic, from headers alone.

Works on any system, without MLX when --ram is given. The result goes to stdout; exit code 0 means that the question was
answered, whatever the answer is.

Does not: read weights or change a limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from qwq_mlx.cli.command import Command, add_output, make_parser, run_command
from qwq_mlx.cli.generate_flags import FOLLOW_LINKS
from qwq_mlx.errors import OptionError

if TYPE_CHECKING:
    from qwq_mlx.model.folder import ModelFolder
    from qwq_mlx.model.memory.plan import MemoryPlan, ModelShape, Workload

_GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _fit)


def _parser() -> argparse.ArgumentParser:
    from qwq_mlx.model.memory.plan import RESERVE_BYTES, Workload

    parser = make_parser(
        "fit",
        description="Plan the memory of a run from headers alone: what it needs, what fits, what would make it fit.",
        exit_codes="0 answered, 1 failed, 2 wrong usage. The limits of Macs are not measured on Metal",
    )
    add, default = parser.add_argument, Workload()
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        metavar="FOLDER",
        help="model folder, or a GGUF (FILE.gguf, ollama:NAME[:TAG], lmstudio:PUBLISHER/REPO) as it would be converted "
        "(default: QwQ-32B-Preview at 4 bits, group size 64)",
    )
    what.add_argument("--recipe", metavar="NAME", help="plan QwQ-32B-Preview converted by this recipe")
    add("--ram", type=float, metavar="GIB", help="memory of the Mac to plan for, in GiB (default: this machine)")
    _add_hosts(add)
    add("--context", type=int, metavar="N", help="context length in tokens, prompt included (default: the model's own)")
    add("--kv-bits", type=int, metavar="B", help="bits of a quantized KV cache, 8 or 4 (default: off)")
    add(
        "--samples",
        type=int,
        metavar="K",
        dest="n_sequences",
        default=default.n_sequences,
        help="number of sequences decoded side by side (default: %(default)s)",
    )
    add(
        "--prefill-step",
        type=int,
        metavar="N",
        default=default.prefill_step,
        help="prompt tokens per prefill pass (default: %(default)s)",
    )
    add("--compute-type", metavar="TYPE", help="float32 or bfloat16 (default: by backend)")
    add(
        "--draft",
        metavar="FOLDER",
        help="draft model for speculative decoding with mlx-lm",
    )
    add(
        "--draft-tokens",
        type=int,
        metavar="N",
        dest="n_draft",
        default=default.n_draft,
        help="draft tokens per step (default: %(default)s)",
    )
    add(
        "--reserve",
        type=float,
        metavar="GB",
        default=RESERVE_BYTES / 1e9,
        help="memory kept free below the limit, in GB (default: %(default)s)",
    )
    add("--follow-links", action="store_true", help=FOLLOW_LINKS)
    add_output(parser, json="print one line of JSON instead of the text")
    return parser


def _add_hosts(add: Any) -> None:
    """Several Macs."""
    add(
        "--hosts",
        metavar="NAME=GIB,...",
        help="plan for Macs that hold the model together, for example a=16,b=24, or b=24@120 where its memory is read "
        "at 120 GB/s",
    )
    add("--link", metavar="L", help="of these Macs, as --measure-link prints it: which split is faster is told by it")
    add(
        "--measure-link",
        action="store_true",
        help="run by mlx.launch on each of the Macs: sum for 5 s, and print what --link takes",
    )


def _fit(command: Command) -> int:
    text = _measured_link() if command.options.measure_link else _report(command.options)
    if text:
        print(text)
    return 0


def _report(options: argparse.Namespace) -> str:
    from qwq_mlx.model.folder import open_model_folder
    from qwq_mlx.model.memory.advice import cheapest_change, table_of_macs
    from qwq_mlx.model.memory.plan import Backend, ModelShape, Workload, metal_limit_bytes, plan_memory

    for name, value in (("ram", options.ram), ("reserve", options.reserve)):
        if value is not None and not 0 <= value < 1e6:
            raise OptionError(f"{name} is {value!r}, expected a number from 0 to 1,000,000.")
    draft = open_model_folder(options.draft, follow_links=options.follow_links) if options.draft is not None else None
    workload = Workload(
        context=options.context,
        kv_bits=options.kv_bits,
        n_sequences=options.n_sequences,
        prefill_step=options.prefill_step,
        compute_type=options.compute_type,
        draft=None if draft is None else ModelShape(config=draft.config, packed=draft.packed),
        n_draft=options.n_draft,
    )
    reserve_bytes = int(options.reserve * 1e9)
    if options.hosts is not None:
        return _of_hosts(options, workload, reserve_bytes)
    if options.link is not None:
        raise OptionError("`link` needs `hosts`: it is the link between these Macs.")
    backend: Backend = "metal"
    if options.ram is not None:
        limit_bytes = metal_limit_bytes(int(options.ram * _GIB))
    else:
        from qwq_mlx.model.device import backend_name
        from qwq_mlx.model.device import limit_bytes as limit_of_device

        backend, limit_bytes = backend_name(), limit_of_device()
    model, name = _model(options)
    plan = plan_memory(model, workload, limit_bytes=limit_bytes, reserve_bytes=reserve_bytes, backend=backend)
    change = cheapest_change(model, plan)
    if options.json:
        return json.dumps(_as_json(plan, options.draft) | {"model": name, "change": change and change.text})
    lines = [name, plan.arithmetic(), *_of_mlx_lm(plan), f"what binds: {plan.binds}"]
    lines.append(f"largest context that fits: {plan.largest_context:,}")
    if not plan.fits:
        lines.append(
            f"the least that would fit: {change.text if change else 'nothing; take fewer bits or more memory'}"
        )
    lines += ["", "Mac      limit       needs    largest context   what would make it fit"]
    for gib, each in table_of_macs(model, workload, reserve_bytes=reserve_bytes):
        helps = cheapest_change(model, each)
        note = "fits" if each.fits else helps.text if helps else "nothing"
        limit = (each.limit_bytes or 0) / 1e9
        lines.append(
            f"{gib:>3} GiB{limit:>7.1f} GB{each.peak_bytes / 1e9:>9.1f} GB{each.largest_context:>14,}   {note}"
        )
    return "\n".join(lines)


def _of_hosts(options: argparse.Namespace, workload: Workload, reserve_bytes: int) -> str:
    from qwq_mlx.fit.hosts import as_json, parse_hosts, plan_hosts, report_of_hosts
    from qwq_mlx.fit.speed import parse_link

    for name in ("ram", "draft"):
        if getattr(options, name) is not None:
            raise OptionError(f"`hosts` and `{name}` do not go together. Leave one of them out.")
    hosts = parse_hosts(options.hosts)
    link = None if options.link is None else parse_link(options.link)
    model, name = _model(options)
    plan = plan_hosts(model, workload, hosts, link, reserve_bytes=reserve_bytes)
    if not options.json:
        return report_of_hosts(plan, name, hosts, link)
    return json.dumps(
        {"model": name, "splits": as_json(plan, hosts), "obstacles": plan.obstacles, "alone_token_s": plan.alone}
    )


def _measured_link() -> str:
    """What a link is, measured by all ranks that run this."""
    from qwq_mlx.fit.speed import link_text
    from qwq_mlx.model.link_speed import measure_link
    from qwq_mlx.model.upstream import import_mlx

    group = import_mlx().distributed.init()
    if group.size() < 2:
        raise OptionError("`measure_link` needs several processes: mlx.launch --hosts a,b python -m qwq_mlx.fit ...")
    link = measure_link(group)
    return f"--link {link_text(link)}" if group.rank() == 0 else ""


def _model(options: argparse.Namespace) -> tuple[ModelFolder | ModelShape, str]:
    """What to plan, and its name."""
    from qwq_mlx.default_model import choose_model
    from qwq_mlx.facts import QWQ_32B_PREVIEW
    from qwq_mlx.files.gguf.stores import find_gguf
    from qwq_mlx.model.folder import open_model_folder
    from qwq_mlx.model.memory.plan import shape_of_facts, shape_of_recipe
    from qwq_mlx.quant.recipe import load_recipe

    if options.model is not None:
        if (gguf := find_gguf(options.model)) is not None:
            from qwq_mlx.convert.gguf_recipe import shape_of_gguf  # here, because it comes with numpy and MLX

            return shape_of_gguf(gguf), f"{gguf.label}, converted by its own types"
        folder = choose_model(options.model).folder
        return open_model_folder(folder, follow_links=options.follow_links), options.model
    if options.recipe is not None:
        recipe = load_recipe(options.recipe)
        return shape_of_recipe(QWQ_32B_PREVIEW, recipe), f"{QWQ_32B_PREVIEW.name}, recipe {recipe.name}"
    return shape_of_facts(QWQ_32B_PREVIEW), f"{QWQ_32B_PREVIEW.name}, 4-bit weights, group 64"


def _of_mlx_lm(plan: MemoryPlan) -> list[str]:
    """What keeps mlx-lm to a plan of its own work on a GPU; see `model.memory.batch_and_draft`."""
    if plan.workload.draft is None or plan.backend == "cpu":
        return []
    return [
        f"mlx-lm keeps to this after mx.set_memory_limit({plan.peak_bytes}); without it MLX queues passes on a GPU and "
        "may hold 20 GB more"
    ]


def _as_json(plan: MemoryPlan, draft: str | None) -> dict[str, Any]:
    workload = {**asdict(replace(plan.workload, draft=None)), "draft": draft}
    return {**asdict(plan), "workload": workload, "peak_bytes": plan.peak_bytes, "fits": plan.fits, "binds": plan.binds}


if __name__ == "__main__":
    sys.exit(main())
