"""`draft` of `load` becomes drafters: which folder, whether it can draft for this model, and what passes cost here.

All that can be wrong with a draft model is told before its weights, or the model's, are read. The costs are measured
once for a machine, model, draft model and version, and kept in the user's cache folder.

Does not: draft (`engine.drafters` do).
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx import __version__
from qwq_mlx.engine.draft_length import Costs, CostsAt, costs_at
from qwq_mlx.engine.drafters.model import RAGGED, ModelDrafter
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.speculator import Speculator
from qwq_mlx.engine.pass_costs import LONG_CONTEXT, compile_kernels, measure_costs
from qwq_mlx.errors import LoadError, OptionError
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_dataclass import FieldError, from_json_value
from qwq_mlx.files.user_folders import user_cache_folder
from qwq_mlx.model import kernels
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.blas import uses_blas
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.folder import ModelFolder, open_model_folder
from qwq_mlx.model.kernels.device import cuda_kernels_run
from qwq_mlx.model.load import LoadedModel, load_model
from qwq_mlx.model.memory.activations import MIN_BLAS_ROWS
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED
from qwq_mlx.model.memory.plan import ModelShape
from qwq_mlx.model.ranks import ranks_of
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.model.upstream import package_version
from qwq_mlx.options import Limits

__all__ = ["DRAFT_VARIABLE", "DraftChoice", "choose_draft", "make_speculator"]

DRAFT_VARIABLE = "QWQ_MLX_DRAFT"
"""Names what `draft="auto"` takes: the folder of a draft model, or "ngram" or "off"."""

_SCHEMA = 2
_BUFFER_SETTINGS = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")  # of MLX: work that is handed over at a time
_KERNELS = sorted(Path(kernels.__file__).parent.glob("*.cu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A file of costs. key: all that they depend on."""

    schema: int
    key: Mapping[str, Any]
    costs: list[CostsAt]

    def __post_init__(self) -> None:
        contexts = [each.context for each in self.costs]
        if not contexts or contexts != sorted(set(contexts)):
            raise OptionError(f"costs are those at contexts {contexts}, expected at least one, rising")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftChoice:
    """Who is to draft.

    uses_texts: an automaton over the texts so far. Where it is False, nobody drafts.
    files: of a draft model, checked; None for none.
    length: ids to draft whatever they cost; None takes as many as pay.
    """

    uses_texts: bool = False
    files: ModelFolder | None = None
    length: int | None = None

    @property
    def shape(self) -> ModelShape | None:
        """The draft model's, for the memory plan."""
        return None if self.files is None else ModelShape(config=self.files.config, packed=self.files.packed)


def choose_draft(
    draft: str | Path | None,
    length: int | None,
    target: ModelFolder,
    *,
    reproducible: bool = False,
    follow_links: bool = False,
    environment: Mapping[str, str] | None = None,
) -> DraftChoice:
    """Check what `load` was asked for.

    draft: "ngram", "auto", "off" or None, or a draft model's folder. length: ids to draft whatever they cost, or None.
    Raises OptionError, LoadError or SourceError, before any weight is read.
    """
    if draft == "auto":
        draft = (os.environ if environment is None else environment).get(DRAFT_VARIABLE) or "ngram"
    if draft == "":
        raise OptionError("draft is empty. Give ngram, auto, off or the folder of a draft model.")
    if draft is None or draft == "off":
        if length is not None:
            raise OptionError(f"draft_length is {length}, but nothing is drafted. Give `draft` too, or leave it out.")
        return DraftChoice()
    if length is not None and (type(length) is not int or not 1 <= length <= MAX_DRAFTED):
        raise OptionError(f"draft_length is {length!r}, expected a whole number from 1 to {MAX_DRAFTED}.")
    if reproducible and backend_name() == "metal":
        raise OptionError(
            "`reproducible` computes one row a pass on Metal, so that drafts could not be checked beside it. "
            "Leave out one of `reproducible` and `draft`."
        )
    if draft == "ngram":
        return DraftChoice(uses_texts=True, length=length)
    files = open_model_folder(draft, follow_links=follow_links)
    _check_sizes(files, target)
    _check_vocabulary(files, target)
    return DraftChoice(uses_texts=True, files=files, length=length)


def _check_sizes(draft: ModelFolder, target: ModelFolder) -> None:
    sizes = [sum(map(math.prod, tensor_shapes(files.config).values())) for files in (draft, target)]
    if sizes[0] > sizes[1]:
        raise LoadError(
            f"{draft.path}: the draft model has {sizes[0]:,} weights, the model only {sizes[1]:,}, so drafts would "
            "cost more than they save. Give a smaller draft model, for example one of 0.5 billion weights."
        )


def _check_vocabulary(draft: ModelFolder, target: ModelFolder) -> None:
    """Each id must be the same token. Rows of the embedding behind the last token are padding and may differ."""
    names = []
    for files in (draft, target):
        backend = load_tokenizer(files.path, vocab_size=files.config.vocab_size).backend
        names.append({token_id: name for name, token_id in backend.get_vocab(with_added_tokens=True).items()})
    if names[0] == names[1]:
        return
    first = min(each for each in names[0].keys() | names[1].keys() if names[0].get(each) != names[1].get(each))
    shown = [repr(each[first]) if first in each else "no token" for each in names]
    raise LoadError(
        f"{draft.path / 'tokenizer.json'}: the vocabulary is another than the model's. The first difference is id "
        f"{first:,}: {shown[0]} in the draft model, {shown[1]} in the model. Give a draft model of the same tokenizer."
    )


def make_speculator(
    model: LoadedModel,
    choice: DraftChoice,
    *,
    limits: Limits,
    cache_folder: Path | None = None,
) -> Speculator | None:
    """Load the draft model, measure what passes cost unless that is known, and make what the decoder asks.

    limits: with kv_bits a number or None. cache_folder: for what was measured; None is the user's.
    Returns None where nobody drafts.
    """
    if not choice.uses_texts:
        return None
    kv_bits = limits.kv_bits if isinstance(limits.kv_bits, int) else None
    draft = drafter = None
    if choice.files is not None:
        draft = load_model(choice.files.path, compute_type=model.compute_type)
        drafter = ModelDrafter(
            draft.module,
            n_ids=model.tokenizer.n_ids,
            chunk=limits.prefill_step,
            context=draft.config.max_position_embeddings,
            kv_bits=kv_bits,
        )
    costs: Costs | None = None
    notes: list[str] = []
    if choice.length is None:
        folder = cache_folder or user_cache_folder(os.environ) / "pass-costs"
        costs = costs_at(_costs(model, choice, drafter, limits, folder, notes.append))
    compile_kernels(model.module, 1 + (choice.length or MAX_DRAFTED))
    if draft is not None:
        compile_kernels(draft.module, RAGGED)
    return Speculator(ngram=NgramDrafter(), model=drafter, costs=costs, length=choice.length, notes=notes)


def _costs(
    model: LoadedModel,
    choice: DraftChoice,
    drafter: ModelDrafter | None,
    limits: Limits,
    folder: Path,
    note: Callable[[str], None],
) -> list[CostsAt]:
    """What passes cost: measured earlier, or now. note: told of what could not be read or written."""
    kv_bits = limits.kv_bits if isinstance(limits.kv_bits, int) else None
    most_context = limits.context or model.config.max_position_embeddings
    key = _key(model, choice, kv_bits) | {"is_long": most_context > LONG_CONTEXT}
    path = folder / f"{sha256_json(key)[:32]}.json"
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and value.get("key") == key:
            return from_json_value(value, _Kept).costs
    except FileNotFoundError:
        pass
    except (OSError, ValueError, FieldError, OptionError) as error:
        note(f"{path}: cannot be read ({error}), so passes are measured again")
    most_rows = MIN_BLAS_ROWS - 1 if uses_blas(model.module) else 1 + MAX_DRAFTED
    costs = measure_costs(
        model.module,
        n_ids=model.tokenizer.n_ids,
        kv_bits=kv_bits,
        drafter=drafter,
        most_rows=most_rows,
        most_context=most_context,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(asdict(_Kept(schema=_SCHEMA, key=key, costs=costs))) + "\n").encode())
    except OSError as error:
        note(f"{path}: cannot be written ({error}), so passes are measured again next time")
    return costs


def _key(model: LoadedModel, choice: DraftChoice, kv_bits: int | None) -> dict[str, Any]:
    """All that the costs depend on: machine, versions, kernels, shapes and types."""
    draft, ranks = choice.shape, ranks_of(model.module)
    shapes = {"model": _shape_key(ModelShape(config=model.config, packed=model.packed))}
    if draft is not None:
        shapes["draft"] = _shape_key(draft)
    return {
        "schema": _SCHEMA,
        "machine": f"{platform.system()} {platform.machine()} {platform.node()} {os.cpu_count()}",
        "device": str(mx.device_info().get("device_name", "")) or backend_name(),
        "versions": {name: package_version(name) for name in ("mlx", "mlx-lm")} | {"qwq-mlx": __version__},
        "buffers": {name: os.environ.get(name, "") for name in _BUFFER_SETTINGS},
        "kernels": sha256_json([each.read_text(encoding="utf-8") for each in _KERNELS]) if cuda_kernels_run() else "",
        "compute_type": model.compute_type,
        "kv_bits": kv_bits,
        **({} if ranks is None else {"split": [ranks.split.kind, *ranks.split.n_layers]}),
        **shapes,
    }


def _shape_key(shape: ModelShape) -> str:
    packed = {path: asdict(packing) for path, packing in sorted(shape.packed.items())}
    return sha256_json({"config": asdict(shape.config), "packed": packed})
