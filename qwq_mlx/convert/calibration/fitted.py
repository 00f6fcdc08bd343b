"""What the calibration pass fitted, on the disk until the conversion has it: packed layers, and the output's moments.

    layer-00000.safetensors   codes, scales and biases of a layer's matrices, named as in the conversion
    output.safetensors        sums of products of what the output matrix is fed with, float64; it comes last

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

from qwq_mlx.convert.calibration.pass_state import arrays_of, header_of, text_of
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.header import Header, place_tensors
from qwq_mlx.files.rows import read_rows
from qwq_mlx.quant.error_feedback import InputMoments, factor_moments, fit_rows
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, float_values

__all__ = ["FittedMatrices", "layer_header", "open_fitted", "write_layer", "write_output"]


@dataclass(frozen=True, slots=True)
class FittedMatrices:
    """Rows of matrices as the pass packed them.

    headers: path of a matrix -> its file. output: path of the output matrix and the moments of its input, where its
    rows are fitted as they are converted.
    """

    headers: Mapping[str, Header] = field(default_factory=dict)
    output: tuple[str, InputMoments] | None = None

    def __contains__(self, path: str) -> bool:
        """Whether a text has a say in how the matrix is packed. path: without ".weight"."""
        return path in self.headers or (self.output is not None and path == self.output[0])

    def rows(self, path: str, first: int, raw: NDArray[Any], dtype: str, packing: Packing, *, stored: str) -> Packed:
        """Some rows of a matrix that is in here, packed.

        first: of the rows. raw: their weights, (rows, columns), DTYPES[dtype], finite; for the
        output matrix, whose rows are fitted now. stored: the type of scales and biases.
        Raises SourceError where a file cannot be read any more.
        """
        if self.output is not None and path == self.output[0]:
            return fit_rows(float_values(raw, dtype), self.output[1], packing, stored)
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


def layer_header(folder: Path, index: int, run: Mapping[str, Any]) -> Header | None:
    """The header of a layer's file; None where there is none of this run, or it is not whole."""
    return header_of(_layer_path(folder, index), "run", run)


def write_output(folder: Path, path: str, run: Mapping[str, Any], products: Sequence[NDArray[np.float64]]) -> None:
    """Write the moments of the output matrix's input, by which the pass is complete. Raises OSError."""
    layout = [(str(place), "F64", each.shape) for place, each in enumerate(products)]
    head, _ = place_tensors(layout, {"run": text_of(run), "path": path})
    write_file(folder / _OUTPUT, b"".join([head, *(each.astype("<f8").tobytes() for each in products)]))


def open_fitted(folder: Path, n_layers: int, run: Mapping[str, Any]) -> FittedMatrices | None:
    """All that a pass found; None where it is not complete, or of another run."""
    output = header_of(folder / _OUTPUT, "run", run)
    layers = [layer_header(folder, index, run) for index in range(n_layers)]
    if output is None or None in layers:
        return None
    fitted_output = layer_header(folder, n_layers, run)
    moments = None
    if fitted_output is None:
        arrays = arrays_of(output)
        moments = factor_moments([arrays[str(place)] for place in range(len(arrays))])
    headers = {
        name.removesuffix(".scales"): header
        for header in (*layers, fitted_output)
        if header is not None
        for name in header.tensors
        if name.endswith(".scales")
    }
    return FittedMatrices(headers, None if moments is None else (output.metadata["path"], moments))


_OUTPUT = "output.safetensors"


def _layer_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"
