"""A calibration text run through the source, layer by layer, and every layer packed as its turn comes.

The text passes the layers that are packed already, so that each matrix is fitted to what it will really be fed with
(sequential fitting), and, where it is long enough, beside them those of the float model, so that it gives what that
would give (`quant.float_targets`). A layer is read, and for each of its parts in turn the hidden states of all texts go
up to it, as packed so far and in float; the products of its inputs are added up (`input_products`), its matrices are
fitted, and the layer goes on with them as they are packed. In memory are one layer, with the float model as it was
and as it is packed, and one or two streams of hidden states, whatever the model's depth.

A resumed pass goes on behind the last layer that was kept. The embedding is not calibrated, since its input is an id,
unless it is tied to the output matrix; that one is fitted as it is converted, for only its rows' input has to be known.
What passes the packed layers begins with the embedding as it is packed, unless it is tied.
Figures are those of the device, version of MLX and BLAS that ran them: others differ in last digits and so in codes.

Does not: fetch (`collect` does), or write a conversion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.calibration.fitted import FittedMatrices, layer_header, open_fitted, write_layer, write_output
from qwq_mlx.convert.calibration.input_products import InputProducts
from qwq_mlx.convert.calibration.pass_state import (
    PassShape,
    PassState,
    PassStateWriter,
    pass_state_path,
    read_pass_state,
)
from qwq_mlx.convert.calibration.text import DEVICE_WEIGHTS, FIT_ROWS
from qwq_mlx.convert.pack import workers
from qwq_mlx.convert.plan import Plan, PlannedTensor
from qwq_mlx.files.rows import read_rows
from qwq_mlx.model.blas_threads import one_blas_thread
from qwq_mlx.model.device import backend_name, small_cache
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.layers import Layer, LayerStream
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.device_feedback import fit_rows_on_device
from qwq_mlx.quant.device_moments import DeviceMoments, exact_product, factor_on_device
from qwq_mlx.quant.error_feedback import DAMPING, InputMoments, factor_moments, fit_rows
from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.float_targets import float_targets
from qwq_mlx.quant.gguf_blocks import decode_block
from qwq_mlx.quant.packing import Packed, float_values
from qwq_mlx.quant.rounding_error import unpack

__all__ = ["fit_layers", "run_mapping", "saved_pass"]

_ADDED = ("o_proj", "down_proj")  # whose outputs are added to the residual stream
_Moments = TypeVar("_Moments", InputMoments, DeviceMoments)


def run_mapping(plan: Plan) -> dict[str, Any]:
    """What the bits of a pass follow from. Raises OSError where a local source's shard is not there any more.

    Of a local source, which may be trained on under the same name, when its shards were last changed, by the clock that
    utime and cp -p cannot set back; one from the Hub stays what its commit is.
    """
    mx, origin = import_mlx(), plan.origin
    assert plan.calibration is not None
    shards = () if origin.is_remote else plan.checkpoint.shards
    return {
        "source": origin.commit,
        "changed": {shard.path.name: shard.path.stat().st_ctime_ns for shard in shards},
        **plan.calibration.as_mapping(),
        "damping": DAMPING,
        "is_toward_float": plan.calibration.is_toward_float,
        "recipe": plan.recipe.text,
        "type": default_compute_type(),
        "backend": backend_name(),
        "mlx": mx.__version__,
        "numpy": np.__version__,
    }


def saved_pass(plan: Plan, folder: Path) -> PassState | None:
    """How far an earlier run of `fit_layers` came; None where nothing is kept."""
    run, calibration = run_mapping(plan), plan.calibration
    assert calibration is not None
    shape = PassShape(
        n_layers=plan.config.num_hidden_layers,
        lengths=[len(text) for text in calibration.texts],
        width=plan.config.hidden_size,
        is_toward_float=calibration.is_toward_float,
    )
    state = read_pass_state(pass_state_path(folder), run, shape)
    is_whole = state is not None and all(layer_header(folder, index, plan, run) for index in range(state.n_layers))
    return state if is_whole else None


def fit_layers(
    plan: Plan,
    folder: Path,
    progress: Callable[[str], None],
    *,
    before: Callable[[str], None] = lambda part: None,
    is_there: Callable[[str], bool] = lambda shard: True,
    state: PassState | None = None,
) -> FittedMatrices:
    """Pack every layer's matrices by the plan's text, into the folder.

    progress: called with the name of each layer's first matrix. before: called with the beginning of the names of the
    tensors that are read next ("model.layers.0."); when it returns they have to be there. is_there: whether a shard,
    by its name, can still be read behind the last layer. state: what `saved_pass` found, to go on from.
    Raises SourceError; ConversionError for activations that are not finite; OSError where a file cannot be written.
    """
    run = run_mapping(plan)
    _Pass(plan, folder, run, progress).run(before, is_there, state)
    fitted = open_fitted(folder, plan, run)
    assert fitted is not None  # it was just written
    pass_state_path(folder).unlink(missing_ok=True)
    return fitted


class _Pass:
    """One run of the text."""

    def __init__(self, plan: Plan, folder: Path, run: dict[str, Any], progress: Callable[[str], None]) -> None:
        assert plan.calibration is not None
        checkpoint = plan.checkpoint
        self._plan, self._folder, self._run, self._progress = plan, folder, run, progress
        self._texts, self._is_toward_float = plan.calibration.texts, plan.calibration.is_toward_float
        self._matrices = {
            each.source.name.removesuffix(".weight"): each
            for each in plan.tensors
            if each.packing is not None and not each.is_repacked
        }
        files = ModelFolder(path=checkpoint.shards[0].path.parent, checkpoint=checkpoint, config=plan.config, packed={})
        self._stream = LayerStream(files)
        self._keeper = PassStateWriter(pass_state_path(folder), run)

    def run(self, before: Callable[[str], None], is_there: Callable[[str], bool], state: PassState | None) -> None:
        mx, stream = import_mlx(), self._stream
        if state is None:
            before("model.embed_tokens.")
            n_done, float_hidden = 0, [stream.embed(text) for text in self._texts] if self._is_toward_float else []
            hidden = self._embed_packed() or list(float_hidden) or [stream.embed(text) for text in self._texts]
        else:
            n_done, compute_type = state.n_layers, getattr(mx, stream.compute_type)
            hidden, float_hidden = state.hidden, state.float_hidden
            for kept in (hidden, float_hidden):
                kept[:] = [mx.array(kept.pop(0)).astype(compute_type) for _ in range(len(kept))]
        for index in range(n_done, self._plan.config.num_hidden_layers):
            before(f"model.layers.{index}.")
            self._fit_layer(index, hidden, float_hidden)
            if self._keeper.is_due():
                self._keeper.keep(PassState(n_layers=index + 1, hidden=hidden, float_hidden=float_hidden))
        before("model.norm.")
        head = stream.head()
        products = InputProducts(head.path)
        for each, float_each in itertools.zip_longest(hidden, float_hidden):
            products.add(head.norm(each), None if float_each is None else head.norm(float_each))
        matrix = self._matrices.get(head.path)
        moments = list(products.moments())
        drifts = products.drifts()
        if backend_name() != "cpu" and matrix is not None and is_there(self._shard_name(matrix)):
            on_device = factor_on_device([mx.array(each.astype(np.float32)) for each in moments])
            fed = _Fed(on_device, [mx.array(each) for each in drifts])
            packed = self._fit_on_device(matrix, fed, lambda rows: None)
            write_layer(self._folder, self._plan.config.num_hidden_layers, self._run, {head.path: packed})
        write_output(self._folder, self._run, moments, [np.array(each) for each in drifts])

    def _embed_packed(self) -> list[Any]:
        """The hidden states of all texts by the embedding as it will be packed; [] where it is not, or is fitted by
        what the text comes to at its end."""
        matrix = self._matrices.get("model.embed_tokens")
        if matrix is None or self._plan.config.tie_word_embeddings:
            return []
        mx, packing, stored = import_mlx(), matrix.packing, matrix.stored_dtype
        assert packing is not None  # only such are in `_matrices`
        shard, entry = self._plan.checkpoint.tensors[matrix.source.name]
        ids, places = np.unique(np.concatenate([np.array(text) for text in self._texts]), return_inverse=True)
        data = read_rows(shard, entry, ids.tolist())
        packed, _ = fit_block(*decode_block(data, len(ids), entry.dtype), packing, fit=self._plan.fit, stored=stored)
        rows = mx.array(unpack(packed, packing, stored, stream=None)).astype(getattr(mx, self._stream.compute_type))
        starts = np.cumsum([len(text) for text in self._texts])[:-1]
        hidden = [rows[mx.array(each)] for each in np.split(places.reshape(-1), starts)]
        mx.eval(hidden)
        return hidden

    def _shard_name(self, matrix: PlannedTensor) -> str:
        return self._plan.checkpoint.tensors[matrix.source.name][0].path.name

    def _fit_layer(self, index: int, hidden: list[Any], float_hidden: list[Any]) -> None:
        """Fit and write a layer's matrices, and move the hidden states past it: as it is packed, and as it was."""
        layer, *twins = self._stream.twins(index) if float_hidden else (self._stream.layer(index),)
        self._progress(f"{layer.prefix}self_attn.q_proj")
        packed: dict[str, tuple[Packed, str]] = {}
        for part in layer.parts:
            matrices = {path: self._matrices[path] for path in part if path in self._matrices}
            if not matrices:
                continue
            products = InputProducts(next(iter(matrices)))
            for each, float_each in itertools.zip_longest(hidden, float_hidden):
                x, stream = layer.fed(each, part)
                if float_each is None:
                    products.add(x)
                    continue
                float_x, float_stream = twins[0].fed(float_each, part)
                products.add(x, float_x, float_stream - stream if part[0].endswith(_ADDED) else None)
            packed |= (self._fit_on_cpu if backend_name() == "cpu" else self._fit_on_gpu)(matrices, products, layer)
        write_layer(self._folder, index, self._run, packed)
        for states, passed in zip((hidden, float_hidden), (layer, *twins), strict=False):
            for place, each in enumerate(states):
                states[place] = passed(each)

    def _fit_on_cpu(
        self, matrices: Mapping[str, PlannedTensor], products: InputProducts, layer: Layer
    ) -> dict[str, tuple[Packed, str]]:
        """Fit matrices of one input on every core, and put them into the layer as they will be unpacked."""
        fed = _Fed(factor_moments(products.moments()), products.drifts(), products.residual())
        return {path: self._fit_matrix(matrix, fed, layer) for path, matrix in matrices.items()}

    def _fit_on_gpu(
        self, matrices: Mapping[str, PlannedTensor], products: InputProducts, layer: Layer
    ) -> dict[str, tuple[Packed, str]]:
        """The same on the GPU."""
        mx, residual = import_mlx(), products.residual()
        fed = _Fed(
            factor_on_device(products.moments_on_device()),
            [mx.array(each) for each in products.drifts()],
            None if residual is None else mx.array(residual),
        )
        packed = {}
        for path, matrix in matrices.items():
            unpacked: list[Any] = []
            packed[path] = self._fit_on_device(matrix, fed, unpacked.append)
            layer.replace(path, mx.concatenate(unpacked))
        return packed

    def _fit_matrix(self, matrix: PlannedTensor, fed: _Fed[InputMoments], layer: Layer) -> tuple[Packed, str]:
        """Fit a matrix on every core."""
        path = matrix.source.name.removesuffix(".weight")
        shard, entry = self._plan.checkpoint.tensors[matrix.source.name]
        n_rows, packing, stored = entry.shape[0], matrix.packing, matrix.stored_dtype
        assert packing is not None  # only such are in `_matrices`

        def fit(first: int) -> tuple[Packed, NDArray[np.float32]]:
            data = read_rows(shard, entry, range(first, min(first + FIT_ROWS, n_rows)))
            weights = float_values(*decode_block(data, len(data), entry.dtype))
            rows = fit_rows(fed.targets(weights, first), fed.moments, packing, stored)
            return rows, unpack(rows, packing, stored, stream=None)

        with one_blas_thread():
            parts = list(workers(self._plan.n_workers).map(fit, range(0, n_rows, FIT_ROWS)))
        layer.replace(path, np.concatenate([whole for _, whole in parts]))
        return _joined([rows for rows, _ in parts]), stored

    def _fit_on_device(
        self, matrix: PlannedTensor, fed: _Fed[DeviceMoments], unpacked: Callable[[Any], None]
    ) -> tuple[Packed, str]:
        """Fit a matrix on the GPU, DEVICE_WEIGHTS at a time. unpacked: is called with the rows as they unpack."""
        mx = import_mlx()
        shard, entry = self._plan.checkpoint.tensors[matrix.source.name]
        (n_rows, columns), packing, stored = entry.shape, matrix.packing, matrix.stored_dtype
        assert packing is not None  # only such are in `_matrices`
        parts = []
        step = max(1, DEVICE_WEIGHTS // columns)
        for first in range(0, n_rows, step):
            data = read_rows(shard, entry, range(first, min(first + step, n_rows)))
            weights = mx.array(float_values(*decode_block(data, len(data), entry.dtype)))
            with small_cache(4 * 4 * DEVICE_WEIGHTS):  # CUDA's allocations wait for all that is under way
                packed, values = fit_rows_on_device(fed.targets(weights, first), fed.moments, packing, stored)
            unpacked(values)
            parts.append(packed)
        return _joined(parts), stored


@dataclass(frozen=True, slots=True)
class _Fed(Generic[_Moments]):
    """What a part of a layer is fed with, as a fit takes it. drifts, residual: as `InputProducts` has them."""

    moments: _Moments
    drifts: Sequence[Any]
    residual: Any = None

    def targets(self, weights: Any, first: int) -> Any:
        """Rows of a matrix as they should be; first: of them."""
        residual = None if self.residual is None else self.residual[first : first + len(weights)]
        if isinstance(self.moments, DeviceMoments):
            return float_targets(weights, self.moments.uppers, self.drifts, residual, product=exact_product)
        return float_targets(weights, self.moments.uppers, self.drifts, residual)


def _joined(parts: Sequence[Packed]) -> Packed:
    """Rows one after the other."""
    arrays = ([getattr(rows, name) for rows in parts] for name in ("codes", "scales", "biases"))
    return Packed(*map(np.concatenate, arrays))
