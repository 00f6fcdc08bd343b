"""A calibration text run through the source, layer by layer, and every layer packed as its turn comes.

The text passes the layers that are packed already, so that each is fitted to what it will really be fed with
(sequential fitting): a layer is read, the hidden states of all texts go through it while the products of its inputs are
added up (`quant.error_feedback` says what for), its matrices are fitted and written, and the hidden states go through
it again with the weights as they are packed. In memory are one layer and the hidden states, whatever the model's depth.

A resumed pass goes on behind the last layer that was kept. The embedding is not calibrated, since its input is an id,
unless it is tied to the output matrix; that one is fitted as it is converted, for only its rows' input has to be known.
Figures are those of the device, version of MLX and BLAS that ran them: others differ in last digits and so in codes.

Does not: fetch (`collect` does), or write a conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.calibration.fitted import FittedMatrices, layer_header, open_fitted, write_layer, write_output
from qwq_mlx.convert.calibration.pass_state import PassState, PassStateWriter, pass_state_path, read_pass_state
from qwq_mlx.convert.calibration.text import DEVICE_WEIGHTS, FIT_ROWS
from qwq_mlx.convert.pack import workers
from qwq_mlx.convert.plan import Plan, PlannedTensor
from qwq_mlx.errors import ConversionError
from qwq_mlx.files.rows import read_rows
from qwq_mlx.model.blas_threads import one_blas_thread
from qwq_mlx.model.device import backend_name, small_cache
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.layers import Layer, LayerStream
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.device_feedback import fit_rows_on_device
from qwq_mlx.quant.device_moments import DeviceMoments, factor_on_device
from qwq_mlx.quant.error_feedback import DAMPING, InputMoments, block_size, factor_moments, fit_rows
from qwq_mlx.quant.gguf_blocks import decode_block
from qwq_mlx.quant.packing import Packed, float_values
from qwq_mlx.quant.rounding_error import unpack

__all__ = ["fit_layers", "run_mapping", "saved_pass"]


def run_mapping(plan: Plan) -> dict[str, Any]:
    """What the bits of a pass follow from, beside the checkpoint."""
    mx = import_mlx()
    assert plan.calibration is not None
    return {
        **plan.calibration.as_mapping(),
        "damping": DAMPING,
        "recipe": plan.recipe.text,
        "type": default_compute_type(),
        "backend": backend_name(),
        "mlx": mx.__version__,
        "numpy": np.__version__,
    }


def saved_pass(plan: Plan, folder: Path) -> PassState | None:
    """How far an earlier run of `fit_layers` came; None where nothing is kept."""
    run = run_mapping(plan)
    state = read_pass_state(pass_state_path(folder), run)
    is_whole = state is not None and all(layer_header(folder, index, run) for index in range(state.n_layers))
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
    fitted = open_fitted(folder, plan.config.num_hidden_layers, run)
    assert fitted is not None  # it was just written
    pass_state_path(folder).unlink(missing_ok=True)
    return fitted


class _Pass:
    """One run of the text."""

    def __init__(self, plan: Plan, folder: Path, run: dict[str, Any], progress: Callable[[str], None]) -> None:
        assert plan.calibration is not None
        checkpoint = plan.checkpoint
        self._plan, self._folder, self._run, self._progress = plan, folder, run, progress
        self._texts = plan.calibration.texts
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
            n_done, hidden = 0, [stream.embed(text) for text in self._texts]
        else:
            compute_type = getattr(mx, stream.compute_type)
            n_done, hidden = state.n_layers, [mx.array(each).astype(compute_type) for each in state.hidden]
        for index in range(n_done, self._plan.config.num_hidden_layers):
            before(f"model.layers.{index}.")
            self._fit_layer(index, hidden)
            if self._keeper.is_due():
                floats = [np.array(each.astype(mx.float32)) for each in hidden]
                self._keeper.keep(PassState(n_layers=index + 1, hidden=floats))
        before("model.norm.")
        head, products = stream.head(), _Products()
        for each in hidden:
            products.add(head.norm(each))
        matrix = self._matrices.get(head.path)
        if backend_name() != "cpu" and matrix is not None and is_there(self._shard_name(matrix)):
            packed = self._fit_on_device(matrix, factor_on_device(products.on_device(head.path)), lambda rows: None)
            write_layer(self._folder, self._plan.config.num_hidden_layers, self._run, {head.path: packed})
        write_output(self._folder, head.path, self._run, products.means(head.path))

    def _shard_name(self, matrix: PlannedTensor) -> str:
        return self._plan.checkpoint.tensors[matrix.source.name][0].path.name

    def _fit_layer(self, index: int, hidden: list[Any]) -> None:
        """Fit and write a layer's matrices, and move the hidden states past it as it is packed."""
        layer = self._stream.layer(index)
        self._progress(f"{layer.prefix}self_attn.q_proj")
        inputs: dict[tuple[str, ...], _Products] = {}
        for each in hidden:
            layer(each, lambda paths, x: inputs.setdefault(paths, _Products()).add(x))
        packed: dict[str, tuple[Packed, str]] = {}
        for paths, products in inputs.items():
            matrices = {path: self._matrices[path] for path in paths if path in self._matrices}
            packed |= (self._fit_on_cpu if backend_name() == "cpu" else self._fit_on_gpu)(matrices, products, layer)
        write_layer(self._folder, index, self._run, packed)
        for place, each in enumerate(hidden):
            hidden[place] = layer(each)

    def _fit_on_cpu(
        self, matrices: Mapping[str, PlannedTensor], products: _Products, layer: Layer
    ) -> dict[str, tuple[Packed, str]]:
        """Fit matrices of one input on every core, and put them into the layer as they will be unpacked."""
        moments = factor_moments(products.means(next(iter(matrices), layer.prefix)))
        return {path: self._fit_matrix(matrix, moments, layer) for path, matrix in matrices.items()}

    def _fit_on_gpu(
        self, matrices: Mapping[str, PlannedTensor], products: _Products, layer: Layer
    ) -> dict[str, tuple[Packed, str]]:
        """The same on the GPU."""
        moments = factor_on_device(products.on_device(next(iter(matrices), layer.prefix)))
        packed = {}
        for path, matrix in matrices.items():
            unpacked: list[Any] = []
            packed[path] = self._fit_on_device(matrix, moments, unpacked.append)
            layer.replace(path, import_mlx().concatenate(unpacked))
        return packed

    def _fit_matrix(self, matrix: PlannedTensor, moments: InputMoments, layer: Layer) -> tuple[Packed, str]:
        """Fit a matrix on every core."""
        path = matrix.source.name.removesuffix(".weight")
        shard, entry = self._plan.checkpoint.tensors[matrix.source.name]
        n_rows, packing, stored = entry.shape[0], matrix.packing, matrix.stored_dtype
        assert packing is not None  # only such are in `_matrices`

        def fit(first: int) -> tuple[Packed, NDArray[np.float32]]:
            data = read_rows(shard, entry, range(first, min(first + FIT_ROWS, n_rows)))
            rows = fit_rows(float_values(*decode_block(data, len(data), entry.dtype)), moments, packing, stored)
            return rows, unpack(rows, packing, stored, stream=None)

        with one_blas_thread():
            parts = list(workers(self._plan.n_workers).map(fit, range(0, n_rows, FIT_ROWS)))
        layer.replace(path, np.concatenate([whole for _, whole in parts]))
        return _joined([rows for rows, _ in parts]), stored

    def _fit_on_device(
        self, matrix: PlannedTensor, moments: DeviceMoments, unpacked: Callable[[Any], None]
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
                packed, values = fit_rows_on_device(weights, moments, packing, stored)
            unpacked(values)
            parts.append(packed)
        return _joined(parts), stored


def _joined(parts: Sequence[Packed]) -> Packed:
    """Rows one after the other."""
    arrays = ([getattr(rows, name) for rows in parts] for name in ("codes", "scales", "biases"))
    return Packed(*map(np.concatenate, arrays))


@dataclass(slots=True)
class _Products:
    """Sums of x x^T over all positions, of blocks of channels; float32, on the device, or of numpy on the CPU."""

    n_positions: int = 0
    sums: list[Any] = field(default_factory=list)
    spare: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def add(self, x: Any) -> None:
        """x: (positions, in), of one text."""
        mx = import_mlx()
        x = x.astype(mx.float32)
        if mx.default_device().type == mx.cpu:
            x = np.asarray(x)  # numpy's BLAS: see `model.products`
        step = block_size(x.shape[1])
        for place, first in enumerate(range(0, x.shape[1], step)):
            part = x[:, first : first + step]
            with np.errstate(over="ignore", invalid="ignore"):  # `means` refuses what is not finite
                self._add(place, part)
        self.n_positions += x.shape[0]

    def _add(self, place: int, part: Any) -> None:
        if not isinstance(part, np.ndarray):
            product = part.T @ part
            self.sums[place : place + 1] = [self.sums[place] + product if place < len(self.sums) else product]
            import_mlx().eval(self.sums[place])  # or the whole text's graph is kept
        elif place == len(self.sums):
            self.sums.append(part.T @ part)
        else:
            if self.spare.shape != self.sums[place].shape:
                self.spare = np.empty_like(self.sums[place])
            np.matmul(part.T, part, out=self.spare)  # fresh memory for each would cost as much as the product
            self.sums[place] += self.spare

    def means(self, path: str) -> list[NDArray[np.float64]]:
        """Sums over positions. path: that is fed with x. Raises ConversionError where x was not finite."""
        means = [np.array(each, dtype=np.float64) / self.n_positions for each in self.sums]
        self._check(all(np.isfinite(each).all() for each in means), path)
        return means

    def on_device(self, path: str) -> list[Any]:
        """The same as arrays of MLX, float32."""
        mx = import_mlx()
        means = [mx.array(each) / self.n_positions for each in self.sums]
        self._check(all(mx.isfinite(each).all().item() for each in means), path)
        return means

    def _check(self, is_finite: bool, path: str) -> None:
        if not is_finite:
            raise ConversionError(
                f"The calibration text made activations that are NaN or infinite before {path}. The checkpoint is "
                "damaged, or the text is not of its kind; convert without it."
            )
