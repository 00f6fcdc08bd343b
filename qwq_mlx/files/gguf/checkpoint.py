"""A GGUF file, or the files of a split one, as a checkpoint: tensors under the Hub's names, small files made for it.

llama.cpp's converter leaves Qwen2's matrices as they are (it permutes q and k of Llama alone), so that a tensor is
renamed and nothing else. config.json, generation_config.json and the tokenizer's files are written from the metadata
into a folder of the caller's.

Does not: read tensor data, or decode a block.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qwq_mlx.errors import QwqError, SourceError
from qwq_mlx.files.checkpoint import CONFIG_NAME, Checkpoint, GgufFacts, assemble_checkpoint, open_checkpoint
from qwq_mlx.files.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from qwq_mlx.files.gguf.settings import check_kind, end_ids, make_config, make_generation_config, model_name
from qwq_mlx.files.gguf.stores import GgufFile, find_gguf
from qwq_mlx.files.gguf.tokenizer import ARRAYS, make_tokenizer, make_tokenizer_config, tokens_of
from qwq_mlx.files.gguf.types import INTEGER_TYPES
from qwq_mlx.files.header import Header, TensorEntry

__all__ = ["files_of_model", "hub_name", "open_gguf", "opened_checkpoint", "opened_gguf", "types_text"]

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|bias)")
_TOP_TENSOR = re.compile(r"([a-z_]+)\.(weight)")


@contextmanager
def opened_gguf(file: GgufFile) -> Iterator[Checkpoint]:
    """`open_gguf` into a folder that is there as long as the context is.

    Errors that name one of the small files name the GGUF in front of it, for that folder is gone when they are read.
    """
    with tempfile.TemporaryDirectory(prefix="qwq-mlx-") as temporary:
        try:
            yield open_gguf(file, Path(temporary))
        except QwqError as error:
            error.args = (str(error).replace(f"{temporary}{os.sep}", f"{file.path}: "), *error.args[1:])
            raise


@contextmanager
def opened_checkpoint(source: str | Path, *, follow_links: bool = False) -> Iterator[Checkpoint]:
    """A GGUF, by any of its names, or else a local folder; what was written for a GGUF is there in the context.

    Raises as `open_checkpoint` and `open_gguf` do.
    """
    if (file := find_gguf(source)) is None:
        yield open_checkpoint(Path(source), follow_links=follow_links)
        return
    with opened_gguf(file) as checkpoint:
        yield checkpoint


def open_gguf(file: GgufFile, folder: Path) -> Checkpoint:
    """Read the headers of a GGUF model and write the small files of its checkpoint into `folder`, which exists.

    file: the model's, or any part of a split one.
    Raises SourceError: damaged, incomplete, or no Qwen2 language model.
    """
    paths = files_of_model(file.path)
    headers = [read_gguf_header(each, arrays=ARRAYS if each is paths[0] else ()) for each in paths]
    first = headers[0]
    check_kind(first.metadata, first.path)
    _check_splits(headers)
    shards = [_as_shard(header) for header in headers]
    tensors = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    tokens = tokens_of(first.metadata, first.path)
    ends = end_ids(first.metadata, tokens)
    config = make_config(
        first.metadata,
        first.path,
        vocab_size=_vocab_size(tensors, first.path, len(tokens)),
        is_tied="lm_head.weight" not in tensors,
        end_ids=ends,
    )
    name = model_name(first.metadata, tokens, config)
    tokenizer = make_tokenizer(first.metadata, first.path)
    small_files = {
        CONFIG_NAME: config,
        "generation_config.json": make_generation_config(first.metadata, ends, name),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": make_tokenizer_config(first.metadata, tokenizer, tokens, first.path),
    }
    for small_file, value in small_files.items():
        (folder / small_file).write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
    checkpoint = assemble_checkpoint(
        folder, config=config, weight_map=None, shards=shards, extra_files=[n for n in small_files if n != CONFIG_NAME]
    )
    facts = GgufFacts(path=first.path, label=file.label, name=name, sha256=file.sha256)
    return replace(checkpoint, gguf=facts)


def files_of_model(path: Path) -> list[Path]:
    """The files of a model: one, or all of a split one. Raises SourceError where some are missing."""
    if (match := _SPLIT.fullmatch(path.name)) is None:
        return [path]
    count = int(match[3])
    if not 1 <= count <= 1000:
        raise SourceError(f"{path}: is called one of {count:,} files, expected 1 to 1,000. Give it its own name again.")
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [each.name for each in files if not each.is_file()]:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise SourceError(
            f"{path}: {len(missing):,} of the {count:,} files of the model are missing: {', '.join(missing[:5])}{more}."
            " Fetch them into the same folder."
        )
    return files


def _check_splits(headers: Sequence[GgufHeader]) -> None:
    """Whether the files are the parts that they say they are."""
    n_tensors = sum(len(header.tensors) for header in headers)
    for index, header in enumerate(headers):
        expected = {"split.count": len(headers), "split.no": index, "split.tensors.count": n_tensors}
        for key, value in expected.items():
            said = header.metadata.get(key, value if len(headers) == 1 else None)
            if said != value and not (key == "split.count" and said == 0 and len(headers) == 1):
                raise SourceError(
                    f"{header.path}: {key} is {said!r:.40}, expected {value:,} for part {index + 1} of "
                    f"{len(headers):,}. Give the files of one model their own names again, or fetch them again."
                )


def _as_shard(header: GgufHeader) -> Header:
    """The header as one of a safetensors shard; dtypes are the names of GGUF's types."""
    entries, names = {}, {}
    for each in header.tensors.values():
        name = _name_of(each, header.path)
        entries[name] = TensorEntry(name, each.type.name, each.shape, each.start, each.end)
        names[name] = each.name
    return Header(
        path=header.path,
        size_bytes=header.size_bytes,
        data_start=header.data_start,
        tensors=entries,
        metadata={},
        names_in_file=names,
    )


def hub_name(name: str) -> str | None:
    """A tensor's name in a checkpoint of the Hub; None for one that Qwen2 does not have.

    >>> hub_name("blk.3.ffn_up.weight"), hub_name("v.blk.0.attn_q.weight")
    ('model.layers.3.mlp.up_proj.weight', None)
    """
    layer, top = _LAYER_TENSOR.fullmatch(name), _TOP_TENSOR.fullmatch(name)
    if layer and layer[2] in _PARTS:
        return f"model.layers.{layer[1]}.{_PARTS[layer[2]]}.{layer[3]}"
    return f"{_TOP[top[1]]}.{top[2]}" if top and top[1] in _TOP else None


def _name_of(tensor: GgufTensor, path: Path) -> str:
    """The tensor's name on the Hub. Raises SourceError for one that Qwen2 does not have."""
    name = hub_name(tensor.name)
    if name is None:
        raise SourceError(f"{path}: tensor {tensor.name} is none of a Qwen2 model. Give the GGUF of the model itself.")
    if tensor.type.name in INTEGER_TYPES:
        raise SourceError(
            f"{path}: tensor {tensor.name} is of type {tensor.type.name}, which no model's weights have. Fetch the "
            "file again."
        )
    return name


def _vocab_size(tensors: Mapping[str, TensorEntry], path: Path, n_tokens: int) -> int:
    """Rows of the embedding."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SourceError(f"{path}: has no matrix token_embd.weight, expected that of a model. Fetch the file again.")
    if embedding.shape[0] < n_tokens:
        raise SourceError(
            f"{path}: has {n_tokens:,} tokens, but token_embd.weight has {embedding.shape[0]:,} rows. Fetch it again."
        )
    return embedding.shape[0]


def types_text(entries: Iterable[TensorEntry]) -> str:
    """How many tensors are of which type: "169 of Q4_K, 28 of Q6_K, 141 of F32"."""
    counts = Counter(entry.dtype for entry in entries)
    return ", ".join(f"{n:,} of {dtype}" for dtype, n in counts.most_common())
