"""A model run one layer at a time over many texts, so that a 65 GB checkpoint is measured on a small Mac.

Instead of every layer for one text, every text passes one layer: its weights are read, all hidden states go through it,
and it is let go before the next. In memory are one layer, the hidden states of all texts (positions x hidden, in the
compute type: 4,096 positions of the 32B are 84 MB in float32) and the scratch of one text. Rows of the embedding are
read by position; the output matrix comes in blocks of rows. The layers are mlx_lm's own and read the same bytes, so the
logits are those of `load_model`.

What the matrices of a layer are fed with can be asked for, for calibration: see `Layer.fed`.

Does not: generate (there is no cache), hold a tokenizer, or read the next layer ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import OptionError
from qwq_mlx.files.rows import read_rows
from qwq_mlx.model.blas import Blas, use_blas
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.load import (
    ComputeType,
    default_compute_type,
    model_arguments,
    pack_module,
    packing_arguments,
)
from qwq_mlx.model.products import Rows
from qwq_mlx.model.tensor_bytes import array_of
from qwq_mlx.model.upstream import import_mlx, import_mlx_lm

__all__ = ["HEAD_BLOCK_BYTES", "Head", "HeadBlock", "Layer", "LayerStream"]

HEAD_BLOCK_BYTES = 64 << 20  # of output rows in float32 at a time: 3,276 of the 32B's
_TAPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


class LayerStream:
    """A checked folder whose parts are read when they are asked for.

    compute_type: None picks by backend. unpack: packed matrices become floats as they are read: a layer takes what the
    source's would. On the CPU, matrices of float32 multiply by numpy's BLAS (see `Blas`).
    """

    def __init__(self, files: ModelFolder, *, compute_type: ComputeType | None = None, unpack: bool = False) -> None:
        self.files = files
        self.unpack = unpack
        self.config = files.config
        self.compute_type: ComputeType = compute_type or default_compute_type()
        self._mx = import_mlx()
        self._is_blas = self.compute_type == "float32" and self._mx.default_device().type == self._mx.cpu

    def embed(self, ids: Sequence[int]) -> Any:
        """The embeddings of a text, (positions, hidden); only the rows of its ids are read.

        Raises OptionError for an id beyond the vocabulary, SourceError.
        """
        mx = self._mx
        if not ids or not all(0 <= each < self.config.vocab_size for each in ids):
            raise OptionError(
                f"ids of a text are {list(ids)[:5]}..., expected at least one, all from 0 to "
                f"{self.config.vocab_size - 1:,}. Encode the text with this model's own tokenizer."
            )
        unique = sorted(set(ids))
        table = self._matrix("model.embed_tokens", unique).whole()
        place = {token_id: index for index, token_id in enumerate(unique)}
        hidden = table[mx.array([place[each] for each in ids])]
        mx.eval(hidden)
        return hidden

    def layer(self, index: int) -> Layer:
        """Read one layer. It is in memory until the last reference to it is gone. Raises SourceError."""
        prefix = f"model.layers.{index}."
        return self._made(prefix, list(self._tensors(prefix)))

    def twins(self, index: int) -> tuple[Layer, Layer]:
        """The same layer twice, read once: in memory are one layer and what is replaced in either. Raises as above."""
        prefix = f"model.layers.{index}."
        tensors = list(self._tensors(prefix))
        return self._made(prefix, tensors), self._made(prefix, tensors)

    def _made(self, prefix: str, tensors: Sequence[tuple[str, Any]]) -> Layer:
        block = import_mlx_lm("mlx_lm.models.qwen2").TransformerBlock(model_arguments(self.config))
        if not self.unpack:
            pack_module(block, self.files.packed, prefix)
        block.load_weights([(name.removeprefix(prefix), array) for name, array in tensors], strict=True)
        block.eval()
        if self._is_blas:
            use_blas(block)
        return Layer(block, prefix)

    def head(self) -> Head:
        """The final norm and the output matrix; the matrix is read when its blocks are asked for."""
        return Head(self)

    def n_bytes(self, prefix: str) -> int:
        """Bytes on the disk of all tensors whose names begin so."""
        tensors = self.files.checkpoint.tensors
        return sum(entry.end - entry.start for name, (_, entry) in tensors.items() if name.startswith(prefix))

    def _read(self, name: str, rows: Sequence[int] | None = None) -> Any:
        """A tensor, or some of its rows, as an evaluated array; floats in the compute type, codes as they are."""
        shard, entry = self.files.checkpoint.tensors[name]
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        return array_of(read_rows(shard, entry, rows), entry.dtype, shape, self.compute_type)

    def _tensors(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """A part's tensors by name, unpacked where that is wanted."""
        for name in self.files.checkpoint.tensors:
            path, _, kind = name.rpartition(".")
            if not name.startswith(prefix):
                continue
            if not (self.unpack and path in self.files.packed):
                yield name, self._read(name)
            elif kind == "weight":
                yield name, self._matrix(path, None).weight
            elif kind == "bias":
                yield name, self._read(name)

    def _matrix(self, path: str, rows: Sequence[int] | None) -> Rows:
        packing = self.files.packed.get(path)
        weight = self._read(f"{path}.weight", rows)
        if packing is None:
            return Rows(weight, is_blas=self._is_blas)
        biases = f"{path}.biases"
        packed = Rows(
            weight,
            self._read(f"{path}.scales", rows),
            self._read(biases, rows) if biases in self.files.checkpoint.tensors else None,
            packing_arguments(packing),
            compute_type=self.compute_type,
        )
        if not self.unpack:
            return packed
        whole = packed.whole()
        self._mx.eval(whole)
        return Rows(whole, is_blas=self._is_blas)


class _Reached(Exception):  # noqa: N818 - nothing is wrong
    """Ends a layer's work where the input that was asked for is known. x: that input, (1, positions, in)."""

    def __init__(self, x: Any) -> None:
        self.x = x


@dataclass(slots=True)
class _Watch:
    """Whose input is asked for now. Apart from the layer, or it would be in a cycle and outlive its last reference."""

    paths: tuple[str, ...] = ()


@dataclass(slots=True)
class _Tap:
    """The first of the linear layers `paths`, which all take the same input; it is told of instead of multiplied by,
    when it is asked for."""

    paths: tuple[str, ...]
    linear: Any
    watch: _Watch

    def __call__(self, x: Any) -> Any:
        if self.watch.paths == self.paths:
            raise _Reached(x)
        return self.linear(x)


class Layer:
    """One layer in memory. prefix: of its tensors' names.

    parts: the matrices that take the same input, in the order in which they multiply, as in the checkpoint without
    ".weight": (q, k, v), (o,), (gate, up) and (down,).
    """

    def __init__(self, block: Any, prefix: str) -> None:
        self.prefix = prefix
        self.parts = tuple(tuple(f"{prefix}{module}.{name}" for name in names) for module, names in _TAPS)
        self._block = block
        self._watch = _Watch()
        self._mx = import_mlx()
        self._create_attention_mask = import_mlx_lm("mlx_lm.models.base").create_attention_mask
        for (name, names), paths in zip(_TAPS, self.parts, strict=True):
            module = getattr(block, name)
            setattr(module, names[0], _Tap(paths, getattr(module, names[0]), self._watch))

    def replace(self, path: str, weight: NDArray[np.float32]) -> None:
        """Compute with other weights from now on. path: of a matrix of this layer. weight: (out, in)."""
        part, name = path.removeprefix(self.prefix).split(".")
        module = getattr(self._block, part)
        linear = getattr(module, name)
        inner = linear.linear if isinstance(linear, _Tap) else linear
        if isinstance(inner, Blas):
            replaced: Any = Blas(weight, inner.bias)
            if isinstance(linear, _Tap):
                linear.linear = replaced
            else:
                setattr(module, name, replaced)
        else:
            inner.weight = self._mx.array(weight).astype(inner.weight.dtype)
            self._mx.eval(inner.weight)

    def __call__(self, hidden: Any) -> Any:
        """The hidden states of one text after this layer, (positions, hidden), evaluated."""
        x = hidden[None]  # (1, T, D)
        out = self._block(x, self._create_attention_mask(x, None), None)[0]
        self._mx.eval(out)
        return out

    def fed(self, hidden: Any, part: tuple[str, ...]) -> tuple[Any, Any]:
        """What a part is fed with as hidden states pass the layer, and nothing is computed behind it.

        part: of `parts`. Returns its input, (positions, in), and the residual stream, (positions, hidden), to which
        attention or MLP, whichever the part is of, will add its output. Neither is evaluated yet; evaluate what is
        made of them, or the whole text's graph is kept.
        """
        x, block, is_attention = hidden[None], self._block, part in self.parts[:2]
        mask = self._create_attention_mask(x, None)
        if not is_attention:
            x = x + block.self_attn(block.input_layernorm(x), mask, None)
        self._watch.paths = part
        try:
            if is_attention:
                block.self_attn(block.input_layernorm(x), mask, None)
            else:
                block.mlp(block.post_attention_layernorm(x))
        except _Reached as reached:
            return reached.x[0], x[0]
        finally:
            self._watch.paths = ()
        raise AssertionError(f"{part} is no part of {self.prefix}")


@dataclass(frozen=True, slots=True)
class HeadBlock:
    """Rows of the output matrix: the ids from first_id on, n_ids of them. n_bytes: what they take on the disk."""

    first_id: int
    n_ids: int
    n_bytes: int
    rows: Rows

    def logits(self, normed: Any) -> Any:
        """(positions, hidden) that were normed -> (positions, n_ids), lazy, in the compute type."""
        return self.rows.times(normed)


class Head:
    """The final norm, in memory, and the output matrix, on the disk. path: of that matrix."""

    def __init__(self, stream: LayerStream) -> None:
        self._stream = stream
        self._mx = import_mlx()
        self._weight = stream._read("model.norm.weight")
        self.path = stream.config.output_matrix

    def norm(self, hidden: Any) -> Any:
        """The final norm, (positions, hidden), evaluated."""
        normed = self._mx.fast.rms_norm(hidden, self._weight, self._stream.config.rms_norm_eps)
        self._mx.eval(normed)
        return normed

    def blocks(self, n_ids: int | None = None) -> Iterator[HeadBlock]:
        """The output matrix from the first id to the last, n_ids rows at a time (None: 64 MiB of float32).

        Models of one shape have the same blocks.
        """
        config = self._stream.config
        step = n_ids or max(1, HEAD_BLOCK_BYTES // (4 * config.hidden_size))
        row_bytes = self._stream.n_bytes(f"{self.path}.") // config.vocab_size
        for first in range(0, config.vocab_size, step):
            rows = range(first, min(first + step, config.vocab_size))
            yield HeadBlock(first, len(rows), row_bytes * len(rows), self._stream._matrix(self.path, rows))
