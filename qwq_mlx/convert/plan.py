"""All that the headers tell about a conversion: every output tensor's place and every size, before a weight is read.

Tensors are taken in the order of the source's shards, so each source byte is read once and in order. The outputs of one
tensor (codes, scales, biases) share a shard; within a shard they are ordered by the width of their dtype, widest first,
which keeps each aligned without holes. Shards are filled up to mlx-lm's 5 GiB.

Does not: read weights, check the disk or the output folder (`preflight` does), or choose packings (the recipe does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwq_mlx.convert.calibration.text import Calibration
from qwq_mlx.convert.output_config import make_config, make_index
from qwq_mlx.convert.plan_memory import kernel_bytes, model_peak_bytes, packing_peak_bytes
from qwq_mlx.convert.source import Origin
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.header import DTYPE_BYTES, TensorEntry, place_tensors
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.device import backend_name
from qwq_mlx.quant.error_feedback import block_size
from qwq_mlx.quant.gguf_blocks import packing_that_holds
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import Recipe, layer_of

__all__ = ["BLOCK_BYTES", "TEMPLATE_NAME", "Output", "OutputShard", "Plan", "PlannedTensor", "make_plan"]

BLOCK_BYTES = 8 << 20
"""Bytes of source rows read, packed and written at a time. Part of a result: sums of errors are made by block."""

COPIED = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "LICENSE",
        "NOTICE",
    )
)
"""Files of a checkpoint that a conversion keeps byte for byte. Nothing else is taken over, code least of all."""

TEMPLATE_NAME = "chat_template.jinja"
"""Where a conversion has a chat template that was given for it; every reader takes it before all others."""

SHARD_BYTES = 5 << 30  # as mlx-lm's shards
_SCALE_DTYPES = {"mxfp4": "U8", "nvfp4": "U8", "mxfp8": "U8"}  # affine scales have the weight's dtype


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the conversion and where its bytes go. shard: index into Plan.shards."""

    entry: TensorEntry
    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One source tensor and what becomes of it.

    shard: index of the source shard.
    packing: None leaves it whole.
    stored_dtype: of affine scales and biases, or of the tensor that stays whole.
    outputs: codes, scales and (affine) biases in this order; or the tensor itself.
    """

    source: TensorEntry
    shard: int
    packing: Packing | None
    stored_dtype: str
    outputs: tuple[Output, ...]

    @property
    def is_repacked(self) -> bool:
        """Whether it is a GGUF's matrix that is packed as it was, so that its codes stay what they are."""
        return self.packing is not None and self.packing == packing_that_holds(self.source.dtype)

    @property
    def is_fitted(self) -> bool:
        """Whether `quant.fit` chooses its codes by a kernel of its own, unless a calibration pass does."""
        return self.packing is not None and self.packing.is_affine and not self.is_repacked

    @property
    def is_rounded(self) -> bool:
        """Whether its weights may come out as others."""
        return self.packing is not None or self.stored_dtype != self.source.dtype

    @property
    def n_rows(self) -> int:
        """Rows that a block is cut from; a vector is one row."""
        return self.source.shape[0] if len(self.source.shape) == 2 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a source row."""
        return (self.source.end - self.source.start) // self.n_rows

    @property
    def block_rows(self) -> int:
        """Rows in every block but the last; a GGUF's rows count as if they were bfloat16, since they are decoded."""
        return max(1, BLOCK_BYTES // max(self.row_bytes, 2 * self.source.shape[-1]))

    @property
    def largest_block(self) -> tuple[int, int]:
        """Bytes and weights of the tensor's largest block."""
        rows = min(self.block_rows, self.n_rows)
        return rows * self.row_bytes, rows * self.source.shape[-1]

    @property
    def packed_block_bytes(self) -> int:
        """Bytes that its largest block becomes."""
        made = sum(output.entry.end - output.entry.start for output in self.outputs)
        return min(self.block_rows, self.n_rows) * made // self.n_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One file of the conversion. head: its first bytes (length and header)."""

    name: str
    head: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A conversion, worked out. Sizes in bytes; all exact but peak_memory_bytes.

    origin: the opened source.
    config: of the source.
    recipe: with its bits as they will be.
    tensors: every source tensor and what becomes of it.
    shards: the output's files of weights.
    copied: names of the files that are copied byte for byte.
    config_json: the bytes of that output file.
    index_json: the bytes of that output file.
    n_weights: the source's numbers.
    source_bytes: of the source's tensors.
    output_bytes: of the output, but for its manifest and report.
    n_workers: threads that pack.
    peak_memory_bytes: an estimate for n_workers.
    fetched_bytes: of the source, on the disk at a time.
    n_fetches: how often all of the source is fetched: 0 for a local one, 2 where a calibration text passes shards that
      do not stay.
    quality_note: what is measured of it afterwards, in words.
    calibration: None packs by the recipe's own fit.
    calibration_bytes: on the disk beside the output until it is published: the layers as the pass packed them.
    chat_template: that the conversion gets in place of the source's; None keeps that.
    scale_dtype: of a GGUF's scales and biases; None where the source is none, and its own types are kept.
    """

    origin: Origin
    config: Qwen2Config
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[OutputShard, ...]
    copied: tuple[str, ...]
    config_json: bytes
    index_json: bytes
    n_weights: int
    source_bytes: int
    output_bytes: int
    n_workers: int
    peak_memory_bytes: int
    fetched_bytes: int
    n_fetches: int
    quality_note: str = "not measured"
    calibration: Calibration | None = None
    calibration_bytes: int = 0
    chat_template: str | None = None
    scale_dtype: str | None = None

    @property
    def fit(self) -> str:
        """How scales are chosen: a name of quant.modes.FITS."""
        return self.recipe.fit if self.calibration is None else "calibrated"

    @property
    def checkpoint(self) -> Checkpoint:
        """The source's files and tensors."""
        return self.origin.checkpoint

    @property
    def bits_per_weight(self) -> float:
        """Bits of all output tensors over all weights, scales and biases included; mlx-lm's figure."""
        tensors = sum(output.entry.end - output.entry.start for each in self.tensors for output in each.outputs)
        return 8 * tensors / self.n_weights


def make_plan(
    origin: Origin,
    config: Qwen2Config,
    recipe: Recipe,
    *,
    n_workers: int,
    keep_source: bool,
    calibration: Calibration | None = None,
    chat_template: str | None = None,
    scale_dtype: str | None = None,
) -> Plan:
    """Place every output tensor. The source has been checked against `config` and `recipe`; this cannot fail.

    keep_source: whether shards that are fetched stay on the disk. scale_dtype: as in `Plan`.
    """
    checkpoint = origin.checkpoint
    sources = [
        (index, entry)
        for index, shard in enumerate(checkpoint.shards)
        for entry in shard.tensors.values()
        if entry.name in checkpoint.tensors
    ]
    packings = {
        entry.name: recipe.packing_of(entry.name.removesuffix(".weight"), n_layers=config.num_hidden_layers)
        for _, entry in sources
        if len(entry.shape) == 2
    }
    tensors, shards, places = _place(sources, packings, scale_dtype)
    copied = _copied(checkpoint, chat_template)
    n_weights = sum(math.prod(entry.shape) for _, entry in sources)
    config_json = make_config(checkpoint, copied, packings, recipe)
    index_json = make_index({name: (each.entry, shards[each.shard].name) for name, each in places.items()}, n_weights)
    small_bytes = len(config_json) + len(index_json) + len((chat_template or "").encode())
    small_bytes += sum((checkpoint.folder / name).stat().st_size for name in copied)
    return Plan(
        origin=origin,
        config=config,
        recipe=recipe,
        tensors=tensors,
        shards=shards,
        copied=copied,
        config_json=config_json,
        index_json=index_json,
        n_weights=n_weights,
        source_bytes=sum(shard.size_bytes for shard in checkpoint.shards),
        output_bytes=sum(shard.size_bytes for shard in shards) + small_bytes,
        n_workers=n_workers,
        peak_memory_bytes=_peak_memory(tensors, n_workers, config, calibration),
        fetched_bytes=_fetched_bytes(origin, keep_source),
        n_fetches=0 if not origin.is_remote else 1 if calibration is None or keep_source else 2,
        calibration=calibration,
        calibration_bytes=0 if calibration is None else _calibration_bytes(tensors, config, calibration),
        chat_template=chat_template,
        scale_dtype=scale_dtype,
    )


def _place(
    sources: Sequence[tuple[int, TensorEntry]], packings: Mapping[str, Packing | None], scale_dtype: str | None
) -> tuple[tuple[PlannedTensor, ...], tuple[OutputShard, ...], dict[str, Output]]:
    """Every tensor's plan, the output's shards, and each output by its name. sources: shard's index and entry."""
    stored = {entry.name: _stored_dtype(entry, packings.get(entry.name), scale_dtype) for _, entry in sources}
    groups = [_outputs(entry, packings.get(entry.name), stored[entry.name]) for _, entry in sources]
    shards, places = _fill_shards(groups)
    tensors = tuple(
        PlannedTensor(
            source=entry,
            shard=index,
            packing=packings.get(entry.name),
            stored_dtype=stored[entry.name],
            outputs=tuple(places[name] for name, _, _ in group),
        )
        for (index, entry), group in zip(sources, groups, strict=True)
    )
    return tensors, shards, places


def _stored_dtype(entry: TensorEntry, packing: Packing | None, scale_dtype: str | None) -> str:
    """The type of what is not codes: the source's own, or of a GGUF's tensor the one that was chosen.

    Programs compute in the type that the embedding's scales have, and Qwen2 overflows float16: so these are float32
    where scales are float16, and so are vectors, which a GGUF has in float32.
    """
    if scale_dtype is None:
        return entry.dtype
    if scale_dtype == "F16" and (packing is None or entry.name.startswith("model.embed_tokens.")):
        return "F32"
    return scale_dtype


def _calibration_bytes(tensors: Sequence[PlannedTensor], config: Qwen2Config, calibration: Calibration) -> int:
    """Packed layers and, by a GPU, the packed output matrix; one or two streams of hidden states, and the moments and
    the drift of the output's input."""
    output = f"{config.output_matrix}.weight"
    names = {each.source.name for each in tensors if layer_of(each.source.name) is not None}
    if backend_name() != "cpu":
        names.add(output)
    matrices = (each for each in tensors if each.packing is not None and each.source.name in names)
    packed = sum(made.entry.end - made.entry.start for each in matrices for made in each.outputs)
    width = config.hidden_size
    n_streams = 1 + calibration.is_toward_float
    return packed + n_streams * 4 * calibration.n_ids * width + (4 + 4 * n_streams) * width * block_size(width)


def _copied(checkpoint: Checkpoint, chat_template: str | None) -> tuple[str, ...]:
    """Names of the files that are copied; a template that was given takes the place of the source's."""
    return tuple(
        name for name in checkpoint.extra_files if name in COPIED and (chat_template is None or name != TEMPLATE_NAME)
    )


def _outputs(entry: TensorEntry, packing: Packing | None, stored: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of what a tensor becomes."""
    if packing is None:
        return [(entry.name, stored, entry.shape)]
    rows, columns = entry.shape
    path = entry.name.removesuffix(".weight")
    scale_dtype = stored if packing.is_affine else _SCALE_DTYPES[packing.mode]
    per_group = (rows, columns // packing.group_size)
    outputs: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{path}.weight", "U32", (rows, columns * packing.bits // 32)),
        (f"{path}.scales", scale_dtype, per_group),
    ]
    return [*outputs, (f"{path}.biases", scale_dtype, per_group)] if packing.is_affine else outputs


def _fill_shards(
    groups: Iterable[list[tuple[str, str, tuple[int, ...]]]],
) -> tuple[tuple[OutputShard, ...], dict[str, Output]]:
    contents: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for group in groups:
        size = sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in group)
        if filled and filled + size > SHARD_BYTES:
            contents.append([])
            filled = 0
        contents[-1].extend(group)
        filled += size
    shards, places = [], {}
    for index, content in enumerate(contents):
        content.sort(key=lambda output: -DTYPE_BYTES[output[1]])  # stable: the source's order within a width
        head, entries = place_tensors(content, {"format": "mlx"})
        name = f"model-{index + 1:05d}-of-{len(contents):05d}.safetensors"
        shards.append(OutputShard(name=name, head=head, size_bytes=entries[-1].end))
        places.update({entry.name: Output(entry, index) for entry in entries})
    return tuple(shards), places


def _fetched_bytes(origin: Origin, keep_source: bool) -> int:
    """What shards take on the disk while they are fetched and converted: two at a time, or all that are kept."""
    if not origin.is_remote:
        return 0
    sizes = sorted((shard.size_bytes for shard in origin.checkpoint.shards), reverse=True)
    return sum(sizes if keep_source else sizes[:2])


def _peak_memory(
    tensors: Sequence[PlannedTensor],
    n_workers: int,
    config: Qwen2Config,
    calibration: Calibration | None,
) -> int:
    """The larger of packing and, before it, calibrating."""
    block_bytes, block_weights = (max(sizes) for sizes in zip(*(each.largest_block for each in tensors), strict=True))
    is_gguf = any(each.source.dtype not in DTYPE_BYTES for each in tensors)
    longer = [each.packed_block_bytes for each in tensors if each.packed_block_bytes > block_bytes]
    unplaced_bytes = max(longer, default=0)
    kernel = kernel_bytes() if any(each.is_fitted for each in tensors) else 0
    others = (each for each in tensors if calibration is not None or not each.is_fitted)
    packing = packing_peak_bytes(
        block_bytes,
        block_weights,
        n_workers,
        other_weights=max((each.largest_block[1] for each in others), default=0),
        unplaced_bytes=unplaced_bytes,
        is_gguf=is_gguf,
    )
    if calibration is not None:
        packing = max(packing, model_peak_bytes(calibration.peak_memory_bytes(config, n_workers=n_workers)))
    return packing + kernel
