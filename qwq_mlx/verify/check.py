"""Depths of looking at a conversion: sizes and headers, some or all bytes, and tensors packed again from the source.

The first is what every load does (milliseconds). The second reads the folder (18 GB in some ten seconds) and finds any
flipped bit, or a part of it that is drawn by lot (`sample`). The third needs the source: it packs some tensors again
with the manifest's own recipe and compares their digests, which only the right source, recipe and arithmetic can match.
What a calibration text was fitted to would take the whole pass again; of those matrices the folder's own bytes are
unpacked, and their error against the source is compared with the manifest's.

Does not: change anything, fetch from the network, or judge quality.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwq_mlx.convert.pack import pack_block
from qwq_mlx.convert.plan import Plan, PlannedTensor, make_plan
from qwq_mlx.convert.preflight import check_source
from qwq_mlx.convert.read import Block, open_shard, read_into
from qwq_mlx.convert.source import Origin
from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.checkpoint import Checkpoint, open_checkpoint
from qwq_mlx.files.gguf.checkpoint import opened_checkpoint
from qwq_mlx.files.manifest import Manifest, check_sizes, unlisted_files, verify_full
from qwq_mlx.files.rows import read_rows
from qwq_mlx.quant.gguf_blocks import decode_block
from qwq_mlx.quant.packing import DTYPES, Packed
from qwq_mlx.quant.recipe import recipe_of_mapping
from qwq_mlx.quant.rounding_error import block_error
from qwq_mlx.verify.sample import check_share, verify_sample

__all__ = ["DEFAULT_TENSORS", "Verification", "verify_conversion"]

DEFAULT_TENSORS = 8
"""Source tensors packed again unless told otherwise: an altered tensor among 771 is met with 1 %, 1 in 8 with 66 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found right (anything wrong is raised).

    folder: that was checked.
    n_files: in its manifest.
    n_bytes: of those files.
    is_full: every byte was read.
    sampled: names of the tensors that were drawn and read.
    packed_again: names of the source tensors whose packed bytes were made anew and are the same; of a calibrated
      conversion, matrices whose error against the source is the manifest's.
    repository: that the manifest names as the source.
    commit: that the manifest names as the source.
    unlisted: names of files that are neither in the manifest nor read by a load; with `full` they are refused.
    wall_s: of the check.
    """

    folder: Path
    n_files: int
    n_bytes: int
    is_full: bool
    sampled: tuple[str, ...]
    packed_again: tuple[str, ...]
    repository: str | None
    commit: str | None
    unlisted: tuple[str, ...]
    wall_s: float


def verify_conversion(
    folder: str | Path,
    *,
    full: bool = False,
    sample: float | None = None,
    source: str | Path | None = None,
    follow_links: bool = False,
    n_tensors: int = DEFAULT_TENSORS,
    seed: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Verification:
    """Check a conversion against its manifest, and against its source where one is given.

    folder: the conversion.
    full: read and hash every byte.
    sample: read and hash tensors drawn by lot, at least so many percent of all bytes; None draws none.
    source: the checkpoint's folder, or a GGUF; n_tensors of its tensors are packed again.
    follow_links: read shards that links out of the source lead to.
    n_tensors: how many.
    seed: of both draws; None draws others each time.
    progress: called with bytes read, from several threads.
    Raises OptionError; SourceError naming every difference; LoadError and ConversionError for a source that could not
    be converted.

    >>> from qwq_mlx.verify import verify_conversion
    >>> done = qwq_mlx.convert_checkpoint(FOLDER, "pocket-4bit", recipe="4bit", quality=False)
    >>> verify_conversion("pocket-4bit", source=FOLDER, n_tensors=2, seed=0).packed_again
    ('model.layers.4.input_layernorm.weight', 'model.layers.7.self_attn.v_proj.weight')
    """
    started = time.monotonic()
    folder = Path(folder)
    if type(n_tensors) is not int or n_tensors < 1:
        raise OptionError(f"n_tensors is {n_tensors!r}, expected a whole number of at least 1.")
    if sample is not None:
        check_share(sample)
        if full:
            raise OptionError("full reads every byte, so there is nothing left to sample. Give one of the two.")
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "there is no such folder"
        raise SourceError(
            f"{folder}: {fault}, expected the folder of a conversion. Give the one that holds manifest.json."
        )
    manifest = verify_full(folder, progress) if full else check_sizes(folder)
    sampled = () if sample is None else verify_sample(folder, manifest, sample, seed, progress)
    again: tuple[str, ...] = ()
    if source is not None:
        with opened_checkpoint(source, follow_links=follow_links) as checkpoint:
            again = _pack_again(folder, manifest, checkpoint, n_tensors, seed)
    return Verification(
        folder=folder,
        n_files=len(manifest.files),
        n_bytes=sum(record.size_bytes for record in manifest.files.values()),
        is_full=full,
        sampled=sampled,
        packed_again=again,
        repository=manifest.source.repository,
        commit=manifest.source.commit,
        unlisted=tuple(unlisted_files(folder, manifest)),
        wall_s=time.monotonic() - started,
    )


def _pack_again(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, n_tensors: int, seed: int | None
) -> tuple[str, ...]:
    recipe = recipe_of_mapping(manifest.recipe, where=folder / "manifest.json")
    config = check_source(checkpoint, recipe)
    origin = Origin(checkpoint=checkpoint, repository=None, commit=None)
    scale_dtype = None if manifest.gguf is None or checkpoint.gguf is None else manifest.gguf["scale_dtype"]
    plan = make_plan(origin, config, recipe, n_workers=1, keep_source=False, scale_dtype=scale_dtype)
    _check_names(folder, manifest, plan)
    drawn = random.Random(seed).sample(plan.tensors, min(n_tensors, len(plan.tensors)))
    converted = None if manifest.calibration is None else open_checkpoint(folder)
    wrong = []
    for tensor in drawn:
        records = [manifest.tensors[output.entry.name] for output in tensor.outputs]
        if converted is not None and tensor.packing is not None:
            is_same = f"{_error(plan, tensor, converted):.6g}" == f"{records[0].relative_error:.6g}"
        else:
            is_same = _digests(plan, tensor, manifest.fit) == [record.sha256 for record in records]
        if not is_same:
            wrong.append(tensor.source.name)
    if wrong:
        raise SourceError(
            f"{folder}: {len(wrong):,} of {len(drawn):,} tensors packed again from {checkpoint.where} have "
            f"other {'bytes' if converted is None else 'bytes or errors'}: {', '.join(sorted(wrong)[:10])}. The "
            "conversion is not of this source, or one of the two was changed."
        )
    return tuple(sorted(tensor.source.name for tensor in drawn))


def _check_names(folder: Path, manifest: Manifest, plan: Plan) -> None:
    """The source must lead to the same tensors, or a digest could not be looked up."""
    expected = {o.entry.name: (o.entry.dtype, o.entry.shape) for tensor in plan.tensors for o in tensor.outputs}
    actual = {name: (record.dtype, record.shape) for name, record in manifest.tensors.items()}
    if expected != actual:
        names = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        raise SourceError(
            f"{folder}: {len(names):,} tensors are not those that {plan.checkpoint.where} leads to: "
            f"{', '.join(names[:10])}. Give the source that this conversion was made from."
        )


def _digests(plan: Plan, tensor: PlannedTensor, fit: str) -> list[str]:
    """Of the tensor's outputs, packed now."""
    hashes: list[Any] = [hashlib.sha256() for _ in tensor.outputs]
    shard = plan.checkpoint.shards[tensor.shard].path
    for block in _blocks(plan, tensor):
        packed = pack_block(block, fit=fit, shard=shard)
        for sha256, output in zip(hashes, packed.outputs, strict=True):
            sha256.update(output.data)
    return [sha256.hexdigest() for sha256 in hashes]


def _error(plan: Plan, tensor: PlannedTensor, converted: Checkpoint) -> float:
    """Relative error of a packed matrix of the conversion against the source's, added up as when it was made."""
    packing, stored = tensor.packing, tensor.stored_dtype
    assert packing is not None
    error2 = weight2 = 0.0
    for block in _blocks(plan, tensor):
        rows = range(block.first_row, block.first_row + block.n_rows)
        read = (read_rows(*converted.tensors[output.entry.name], rows) for output in tensor.outputs)
        codes, scales, biases = read
        packed = Packed(codes.view(np.uint32), scales.view(DTYPES[stored]), biases.view(DTYPES[stored]))
        raw, dtype = decode_block(block.data, block.n_rows, tensor.source.dtype)
        error = block_error(raw, dtype, packed, packing, stream=None, stored=stored)
        error2, weight2 = error2 + error.error2, weight2 + error.weight2
    return math.sqrt(error2 / weight2) if weight2 else 0.0


def _blocks(plan: Plan, tensor: PlannedTensor) -> Iterator[Block]:
    """The source's rows, as a conversion reads them."""
    shard = plan.checkpoint.shards[tensor.shard]
    fd = open_shard(shard)
    try:
        for first in range(0, tensor.n_rows, tensor.block_rows):
            n_rows = min(tensor.block_rows, tensor.n_rows - first)
            data = np.empty(n_rows * tensor.row_bytes, np.uint8)
            read_into(fd, shard, tensor.source.start + first * tensor.row_bytes, data, tensor.source.name)
            yield Block(tensor=tensor, first_row=first, n_rows=n_rows, buffer=data, data=data, source_ctime_ns=0)
    finally:
        os.close(fd)
