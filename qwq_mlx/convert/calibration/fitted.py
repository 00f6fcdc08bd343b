"""What the calibration pass fitted, on the disk until the conversion has it: packed layers, and the output's moments.

    layer-00000.safetensors   codes, scales and biases of a layer's matrices, named as in the conversion
    output.safetensors        means of products of what the output matrix is fed with: x x^T in float64, and how far x
                              has drifted (`input_products`) in float32; it comes last

Where a GPU fits and the shard is there, the output matrix is packed by the pass, too, as if it were the layer after the
last.

Each file is written whole and durable, and says of which run it is. Nothing of them stays once a conversion is
published: what they hold follows from source, text and recipe, but takes the whole pass to find.

Does not: fit anything (`fit_layers` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.calibration.pass_state import Layout, arrays_of, header_of, text_of
from qwq_mlx.convert.plan import Plan
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.header import Header, place_tensors
from qwq_mlx.files.rows import read_rows
from qwq_mlx.quant.error_feedback import InputMoments, block_size, factor_moments, fit_rows
from qwq_mlx.quant.float_targets import float_targets
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, float_values
from qwq_mlx.quant.recipe import layer_of

__all__ = ["FittedMatrices", "layer_header", "open_fitted", "write_layer", "write_output"]


@dataclass(frozen=True, slots=True)
class OutputMatrix:
    """path; moments of its input, and how far that has drifted from the float model's, as `float_targets` takes it."""

    path: str
    moments: InputMoments
    drifts: Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class FittedMatrices:
    """Rows of matrices as the pass packed them.

    headers: path of a matrix -> its file. output: the output matrix, where its rows are fitted as they are converted.
    """

    headers: Mapping[str, Header] = field(default_factory=dict)
    output: OutputMatrix | None = None

    def __contains__(self, path: str) -> bool:
        """Whether a text has a say in how the matrix is packed. path: without ".weight"."""
        return path in self.headers or (self.output is not None and path == self.output.path)

    def rows(self, path: str, first: int, raw: NDArray[Any], dtype: str, packing: Packing, *, stored: str) -> Packed:
        """Some rows of a matrix that is in here, packed.

        first: of the rows. raw: their weights, (rows, columns), DTYPES[dtype], finite; for the
        output matrix, whose rows are fitted now. stored: the type of scales and biases.
        Raises SourceError where a file cannot be read any more.
        """
        if self.output is not None and path == self.output.path:
            moments = self.output.moments
            targets = float_targets(float_values(raw, dtype), moments.uppers, self.output.drifts)
            return fit_rows(targets, moments, packing, stored)
        header = self.headers[path]
        wanted = range(first, first + len(raw))
        parts = [read_rows(header, header.tensors[f"{path}.{kind}"], wanted) for kind in ("weight", "scales", "biases")]
        return Packed(parts[0].view(np.uint32), *(part.view(DTYPES[stored]) for part in parts[1:]))


def write_layer(folder: Path, index: int, run: Mapping[str, Any], packed: Mapping[str, tuple[Packed, str]]) -> None:
    """Write a layer's file. packed: path of a matrix -> it, and the dtype of its scales. Raises OSError."""
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    data: list[bytes] = []
    for path, (matrix, dtype) in packed.items():
        assert matrix.biases is not None  # affine mode always has them
        for kind, stored, array in (
            ("weight", "U32", matrix.codes),
            ("scales", dtype, matrix.scales),
            ("biases", dtype, matrix.biases),
        ):
            layout.append((f"{path}.{kind}", stored, array.shape))
            data.append(np.ascontiguousarray(array).tobytes())
    head, _ = place_tensors(layout, {"run": text_of(run)})
    write_file(_layer_path(folder, index), b"".join([head, *data]))


def layer_header(folder: Path, index: int, plan: Plan, run: Mapping[str, Any]) -> Header | None:
    """The header of a layer's file; None where there is none of this run, or it has not the plan's matrices.

    index: of the layer; the number of layers for the output matrix.
    """
    is_output = index == plan.config.num_hidden_layers
    layout = {
        made.entry.name: (made.entry.dtype, made.entry.shape)
        for each in plan.tensors
        if each.packing is not None and not each.is_repacked
        for made in each.outputs
        if (
            each.source.name == f"{plan.config.output_matrix}.weight"
            if is_output
            else layer_of(each.source.name) == index
        )
    }
    return header_of(_layer_path(folder, index), run, layout)


def write_output(
    folder: Path,
    run: Mapping[str, Any],
    products: Sequence[NDArray[np.float64]],
    drifts: Sequence[NDArray[np.float32]],
) -> None:
    """Write the moments of the output matrix's input and its drift, by which the pass is complete. Raises OSError."""
    layout = [(f"moments.{place}", "F64", each.shape) for place, each in enumerate(products)]
    layout += [(f"drift.{place}", "F32", each.shape) for place, each in enumerate(drifts)]
    head, _ = place_tensors(layout, {"run": text_of(run)})
    data = [each.astype("<f8").tobytes() for each in products] + [each.astype("<f4").tobytes() for each in drifts]
    write_file(folder / _OUTPUT, [head, *data])


def open_fitted(folder: Path, plan: Plan, run: Mapping[str, Any]) -> FittedMatrices | None:
    """All that a pass found; None where it is not complete, or of another run."""
    output = header_of(folder / _OUTPUT, run, _output_layout(plan))
    layers = [layer_header(folder, index, plan, run) for index in range(plan.config.num_hidden_layers)]
    if output is None or None in layers:
        return None
    fitted_output = layer_header(folder, len(layers), plan, run)
    matrix = None
    if fitted_output is None:
        arrays = arrays_of(output)
        if not all(np.isfinite(each).all() for each in arrays.values()):
            return None
        moments, drifts = (
            [each for name, each in arrays.items() if name.startswith(f"{kind}.")] for kind in ("moments", "drift")
        )
        matrix = OutputMatrix(plan.config.output_matrix, factor_moments(moments), drifts)
    headers = {
        name.removesuffix(".scales"): header
        for header in (*layers, fitted_output)
        if header is not None
        for name in header.tensors
        if name.endswith(".scales")
    }
    return FittedMatrices(headers, matrix)


_OUTPUT = "output.safetensors"


def _output_layout(plan: Plan) -> Layout:
    assert plan.calibration is not None
    width = plan.config.hidden_size
    step = block_size(width)
    sizes = [min(step, width - first) for first in range(0, width, step)]
    kinds = {"moments": "F64"} | ({"drift": "F32"} if plan.calibration.is_toward_float else {})
    return {f"{kind}.{place}": (dtype, (n, n)) for kind, dtype in kinds.items() for place, n in enumerate(sizes)}


def _layer_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"
