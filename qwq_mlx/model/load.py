"""A model folder becomes a model in memory, or every reason why it cannot.

All checks come before the first weight: file sizes against the manifest, safetensors headers, config against the Qwen2
table, every tensor's name, shape and type, the tokenizer's ids, the generation defaults. Only then does MLX read the
weights, layer by layer.

The compute type follows the backend: float32 on the CPU, where MLX 0.32.4 runs 4-bit weights about 8 times faster with
float32 activations, scales and biases than with bfloat16; bfloat16 on a GPU (not measured on Metal).

Does not: download, convert, run code of the folder, or open any file but JSON, the template and checked safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qwq_mlx.errors import LoadError, OptionError, OutOfMemoryError
from qwq_mlx.files.header import Header
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.attention import attention_class
from qwq_mlx.model.blas import use_blas_for_rows
from qwq_mlx.model.compiled_layers import use_compiled_layers
from qwq_mlx.model.folder import ModelFolder, open_model_folder
from qwq_mlx.model.generation_config import GenerationDefaults, read_generation_defaults
from qwq_mlx.model.kernels.layers import use_few_row_kernels
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.ranks import load_part
from qwq_mlx.model.rotations import use_in_place_attention
from qwq_mlx.model.split import Split, check_split, tensor_split
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer
from qwq_mlx.model.upstream import import_mlx, import_mlx_lm
from qwq_mlx.model.weight_values import check_finite, zero_warnings

__all__ = [
    "ComputeType",
    "LoadProgress",
    "LoadedModel",
    "build_module",
    "default_compute_type",
    "load_model",
    "model_arguments",
    "pack_module",
    "packing_arguments",
]

ComputeType = Literal["float32", "bfloat16"]
LoadProgress = Callable[[int, int], None]
"""Called with the layers whose weights are in memory, and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A checked model, its weights in memory.

    module: mlx_lm's Qwen2 (called with ids (1, n) and a cache, returns logits (1, n, vocab)).
    stop_ids: ids that end a text, from generation_config.json, config.json and the tokenizer together.
    compute_type: what activations, scales and biases are computed in. weights: in words, for people.
    weights_bytes: of the folder's tensors on disk. packed: how its matrices are packed, by path.
    warnings: what of the folder was ignored, is linked from elsewhere or looks damaged, in sentences.
    has_manifest: the folder is a conversion of this package, whose bytes can be compared with their digests.
    reproducible: rows share a pass only as far as each then gets the bits that it gets alone.
    """

    folder: Path
    module: Any
    config: Qwen2Config
    tokenizer: LoadedTokenizer
    defaults: GenerationDefaults
    stop_ids: frozenset[int]
    compute_type: ComputeType
    weights: str
    weights_bytes: int
    packed: Mapping[str, Packing]
    warnings: tuple[str, ...] = ()
    has_manifest: bool = False
    reproducible: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


def default_compute_type() -> ComputeType:
    """float32 on the CPU backend, bfloat16 on a GPU. Raises BackendError where MLX cannot run."""
    mx = import_mlx()
    return "float32" if mx.default_device().type == mx.cpu else "bfloat16"


def load_model(
    folder: str | Path,
    *,
    compute_type: ComputeType | None = None,
    chat_template: str | None = None,
    follow_links: bool = False,
    reproducible: bool = False,
    group: Any | None = None,
    split: Split | None = None,
    progress: LoadProgress | None = None,
) -> LoadedModel:
    """Check a folder and load its weights.

    folder: a checkpoint of floats or a conversion.
    compute_type: None picks by backend.
    chat_template: jinja text in place of the folder's; None keeps that.
    follow_links: read shards that links out of the folder lead to.
    reproducible: see `LoadedModel`.
    group: from `mx.distributed.init`: this process reads its part of the weights alone. None, or a group of one: all.
    split: who of the group holds what; None gives each an even part of every layer.
    progress: called while the weights are read.
    Raises OptionError; LoadError or SourceError naming file, found and expected; BackendError where MLX cannot run.
    """
    if compute_type not in (None, *get_args(ComputeType)):
        raise OptionError(f"compute_type is {compute_type!r}, expected 'float32', 'bfloat16' or None.")
    files = open_model_folder(folder, follow_links=follow_links)
    config = files.config
    defaults = read_generation_defaults(files.path, vocab_size=config.vocab_size)
    tokenizer = load_tokenizer(files.path, vocab_size=config.vocab_size)
    if chat_template is not None:
        tokenizer = replace(tokenizer, chat_template=chat_template)
    stop_ids = _stop_ids(files.path, config, defaults, tokenizer)
    chosen = compute_type or default_compute_type()
    group = group if group is not None and group.size() > 1 else None
    progress = progress or (lambda n_done, n_layers: None)
    if group is None:
        module = _load_weights(files, chosen, progress)
    else:
        module = _load_part(files, chosen, group, split or tensor_split(config, group.size()), progress)
    return LoadedModel(
        folder=files.path,
        module=module,
        config=config,
        tokenizer=tokenizer,
        defaults=defaults,
        stop_ids=stop_ids,
        compute_type=chosen,
        weights=files.weights,
        weights_bytes=files.checkpoint.tensor_bytes,
        packed=files.packed,
        warnings=(*files.warnings, *_check_values(files, module)),
        has_manifest=files.has_manifest,
        reproducible=reproducible,
    )


def _stop_ids(
    folder: Path, config: Qwen2Config, defaults: GenerationDefaults, tokenizer: LoadedTokenizer
) -> frozenset[int]:
    tokenizer_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    stop_ids = frozenset((*defaults.eos_token_ids, *config.eos_token_ids, *tokenizer_ids))
    if not stop_ids:
        raise LoadError(
            f"{folder}: neither generation_config.json nor config.json nor tokenizer_config.json says which id ends a "
            "text, so generation would never stop. Copy generation_config.json from the model's source."
        )
    return stop_ids


def build_module(config: Qwen2Config, packed: Mapping[str, Packing]) -> Any:
    """mlx_lm's Qwen2 of this shape with packed layers where asked; its weights are placeholders, never evaluated."""
    arguments = model_arguments(config)
    module = import_mlx_lm("mlx_lm.models.qwen2").Model(arguments)
    for layer in module.layers:
        layer.self_attn = attention_class()(arguments)
    pack_module(module, packed)
    return module


def model_arguments(config: Qwen2Config) -> Any:
    """The config as mlx_lm's Qwen2 takes it."""
    return import_mlx_lm("mlx_lm.models.qwen2").ModelArgs(
        model_type="qwen2",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling=None if config.yarn is None else config.yarn.as_mlx_lm(),
        tie_word_embeddings=config.tie_word_embeddings,
    )


def pack_module(module: Any, packed: Mapping[str, Packing], prefix: str = "") -> None:
    """Exchange the matrices that are packed for packed layers; prefix: what the module's own paths lack of the model's.

    The new layers' weights are placeholders.
    """
    import mlx.nn as nn

    def packing_of(path: str, _: Any) -> bool | dict[str, Any]:
        packing = packed.get(prefix + path)
        return False if packing is None else packing_arguments(packing)

    if packed:
        nn.quantize(module, class_predicate=packing_of)


def packing_arguments(packing: Packing) -> dict[str, Any]:
    """A packing as the arguments of MLX's quantized functions."""
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def _load_weights(files: ModelFolder, compute_type: ComputeType, progress: LoadProgress) -> Any:
    """Map the checked tensors into a module and read them, one layer at a time."""
    mx = import_mlx()
    module = build_module(files.config, files.packed)
    weights: dict[str, Any] = {}
    for shard in files.checkpoint.shards:
        weights.update(_map_shard(shard, files.checkpoint.tensors, compute_type))
    module.load_weights(list(weights.items()), strict=True)
    weights.clear()  # from here on only the module holds them, so each layer's source bytes go when it is cast
    with _telling_of_memory(files):
        for n_done, layer in enumerate(module.layers):
            progress(n_done, len(module.layers))
            mx.eval(layer.parameters())
        mx.eval(module.parameters())
        progress(len(module.layers), len(module.layers))
    return _ready(module)


def _load_part(files: ModelFolder, compute_type: ComputeType, group: Any, split: Split, progress: LoadProgress) -> Any:
    """A module of this rank's part, its weights read."""
    if split.n_ranks != group.size():
        raise OptionError(f"split is for {split.n_ranks} processes, expected {group.size()}, which the group has.")
    check_split(split, files.config, files.packed)
    module = build_module(files.config, files.packed)
    n_layers = split.n_layers[group.rank()]
    with _telling_of_memory(files):
        load_part(module, files, split, group, compute_type, lambda share: progress(int(share * n_layers), n_layers))
    return _ready(module)


@contextmanager
def _telling_of_memory(files: ModelFolder) -> Iterator[None]:
    """Around reading: a shard that was changed meanwhile and memory that ran out are told as such."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        _check_shards_are_whole(files)
        if not OutOfMemoryError.is_meant_by(error):
            raise
        raise OutOfMemoryError(
            f"{files.path}: memory ran out while the weights were read ({type(error).__name__}: {error}). "
            "End what else takes memory, or take a model of fewer bits."
        ) from error


def _ready(module: Any) -> Any:
    """A module whose weights are in memory, with the products of this machine."""
    module.eval()
    use_blas_for_rows(module)
    use_compiled_layers(module)
    use_few_row_kernels(module)
    use_in_place_attention(module)
    return module


def _check_shards_are_whole(files: ModelFolder) -> None:
    """Raises LoadError for a shard whose size is another than when its header was read."""
    for shard in files.checkpoint.shards:
        size = shard.path.stat().st_size if shard.path.exists() else 0
        if size != shard.size_bytes:
            raise LoadError(
                f"{shard.path}: has {size:,} bytes, had {shard.size_bytes:,} when its header was read. It was changed "
                "while the model was loaded; convert or fetch it again."
            )


def _check_values(files: ModelFolder, module: Any) -> list[str]:
    """Warnings of what the weights hold. A conversion was warned of zeros when it was made. Raises LoadError."""
    from mlx.utils import tree_flatten

    arrays, tensors = cast("list[tuple[str, Any]]", tree_flatten(module.parameters())), files.checkpoint.tensors
    check_finite(arrays, tensors)
    return [] if files.has_manifest else zero_warnings(arrays, tensors)


def _map_shard(shard: Header, wanted: Mapping[str, object], compute_type: ComputeType) -> dict[str, Any]:
    """Lazy arrays of those tensors of a checked header that are wanted, floats cast to the compute type."""
    mx = import_mlx()
    try:
        arrays = cast("dict[str, Any]", mx.load(str(shard.path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"{shard.path}: MLX cannot read it ({error}). Convert or fetch the model again.") from error
    dtype = getattr(mx, compute_type)
    whole = (mx.uint32, mx.uint8)  # codes, and the scales of modes other than affine
    return {
        name: array if array.dtype in whole else array.astype(dtype)
        for name in shard.tensors
        if name in wanted
        for array in (arrays[shard.names_in_file.get(name, name)],)
    }
