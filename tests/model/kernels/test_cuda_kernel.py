from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qwq_mlx.model.kernels
from qwq_mlx.model.kernels import device

FOLDER = Path(qwq_mlx.model.kernels.__file__).parent
FILES = ("tensor_cores.cu", "few_row_matmul.cu")


def _header(monkeypatch: pytest.MonkeyPatch) -> str:
    given: dict[str, Any] = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", given.update)
    device.cuda_kernel(FILES, "name", ["x"], ["y"], "")
    return str(given["header"])


def test_a_kernel_includes_its_files_by_absolute_paths_so_that_little_text_is_hashed_at_each_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header = _header(monkeypatch)
    lines = header.splitlines()
    assert header.endswith("\n"), "MLX writes its own text behind it"
    assert [Path(line.removeprefix('#include "').removesuffix('"')) for line in lines] == [FOLDER / f for f in FILES]


@pytest.mark.parametrize("name", ['with"quote', "with\nline", "mit Umlaut \u00e4"])
def test_where_a_path_cannot_be_written_as_an_include_the_texts_are_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in FILES:
        shutil.copy(FOLDER / file, folder)
    monkeypatch.setattr(importlib.resources, "files", lambda package: folder)
    assert _header(monkeypatch) == "".join((FOLDER / file).read_text() + "\n" for file in FILES)
