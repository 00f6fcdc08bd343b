"""How far a calibration text has come, on the disk: after a kill the pass goes on behind the last layer that was kept.

Kept are the hidden states of all texts in float32, which holds them exactly whatever the compute type: a pass that goes
on ends with the very bits of one that nothing stopped. The file (for the 32B 0.34 GB with 16,384 ids, 2.7 with 65,536)
is written whole and durable after a layer, once a minute at most, so that no more than a minute's work or one layer's,
and what was fetched for it, is done twice. It is of one source, text, recipe, compute type, device and version of MLX;
for any other, or where it does not hold what such a pass keeps, the pass begins anew.

Does not: run the text, or remove the file (`fit_layers` does both).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import SourceError
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.header import Header, place_tensors, read_header
from qwq_mlx.files.rows import read_rows
from qwq_mlx.model.upstream import import_mlx

__all__ = [
    "Layout",
    "PassShape",
    "PassState",
    "PassStateWriter",
    "arrays_of",
    "header_of",
    "pass_state_path",
    "read_pass_state",
    "text_of",
]

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a file has to hold: name of an array -> its dtype and shape."""

_EVERY_S = 60.0
_KINDS = ("packed", "float")
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


@dataclass(frozen=True, slots=True, kw_only=True)
class PassState:
    """A pass under way. n_layers: done.

    hidden, float_hidden: (positions, hidden) of each text behind them as they are packed, and in the float model, of no
    text where that is not run; as they are kept of MLX or numpy, as they are read float32 of numpy.
    """

    n_layers: int
    hidden: list[Any]
    float_hidden: list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """What a pass has to keep. n_layers: of the model. lengths: positions of each text. width: of a hidden state."""

    n_layers: int
    lengths: Sequence[int]
    width: int
    is_toward_float: bool

    @property
    def layout(self) -> Layout:
        """Of its file: the texts one after another, since a file may not have as many arrays as there may be texts."""
        kinds = _KINDS if self.is_toward_float else _KINDS[:1]
        return dict.fromkeys(kinds, ("F32", (sum(self.lengths), self.width)))


def pass_state_path(folder: Path) -> Path:
    """Where a pass is kept whose results go into the folder."""
    return folder / "begun.safetensors"


def read_pass_state(path: Path, run: Mapping[str, Any], shape: PassShape) -> PassState | None:
    """What a file holds; None where there is none, or it is not whole, or of another run or shape.

    run: all that the bits follow from; as it was given to `PassStateWriter`.
    """
    header = header_of(path, run, shape.layout)
    if header is None:
        return None
    n_layers = {str(n): n for n in range(1, shape.n_layers + 1)}.get(header.metadata.get("n_layers", ""))
    if n_layers is None:
        return None
    hidden, float_hidden = (_texts(header, kind, shape.lengths) for kind in _KINDS)
    return PassState(n_layers=n_layers, hidden=hidden, float_hidden=float_hidden)


def _texts(header: Header, kind: str, lengths: Sequence[int]) -> list[NDArray[np.float32]]:
    """The hidden states of a kind, those of each text by themselves."""
    if (entry := header.tensors.get(kind)) is None:
        return []
    starts = itertools.accumulate(lengths, initial=0)
    rows = (range(start, start + length) for start, length in zip(starts, lengths, strict=False))
    return [read_rows(header, entry, each).view("<f4") for each in rows]


def header_of(path: Path, run: Mapping[str, Any], layout: Layout) -> Header | None:
    """The header of a file that a pass kept.

    None where there is none, or it is not whole (a run was stopped), or of another run, or holds anything but these
    arrays.
    """
    if not os.path.lexists(path):
        return None
    try:
        header = read_header(path)
    except SourceError:
        return None
    held = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    return header if header.metadata.get("run") == text_of(run) and held == layout else None


def arrays_of(header: Header) -> dict[str, NDArray[Any]]:
    """All arrays of a file, F32 and F64, by name. Raises SourceError."""
    return {
        name: read_rows(header, entry).reshape(-1).view(_DTYPES[entry.dtype]).reshape(entry.shape)
        for name, entry in header.tensors.items()
    }


def text_of(value: Mapping[str, Any]) -> str:
    """As metadata hold it."""
    return json.dumps(dict(value), sort_keys=True)


class PassStateWriter:
    """Keeps a pass as it goes. path: the file; run: as `read_pass_state` takes it."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._path, self._run = path, run
        self._kept_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last file, or the beginning, is long enough ago."""
        return time.monotonic() - self._kept_at >= _EVERY_S

    def keep(self, state: PassState) -> None:
        """Write the file in place of the last. Raises OSError."""
        kinds = zip(_KINDS, (state.hidden, state.float_hidden), strict=True)
        layout = [(kind, "F32", (sum(map(len, texts)), texts[0].shape[1])) for kind, texts in kinds if texts]
        head, _ = place_tensors(layout, {"run": text_of(self._run), "n_layers": str(state.n_layers)})
        write_file(self._path, itertools.chain([head], map(_bytes_of, [*state.hidden, *state.float_hidden])))
        self._kept_at = time.monotonic()


def _bytes_of(hidden: Any) -> bytes:
    """In float32."""
    floats = hidden if isinstance(hidden, np.ndarray) else np.asarray(hidden.astype(import_mlx().float32))
    return floats.astype("<f4", copy=False).tobytes()
