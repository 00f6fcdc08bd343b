"""The `>>>` examples in docstrings do what they say, and every public name has one.

Examples know `qwq_mlx`, `Path`, and the bundled model: `FOLDER`, a loaded `reasoner`, and a `trace` of it. Files that
they write land in a temporary folder.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qwq_mlx
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.pocket import FOLDER

PACKAGE = Path(__file__).resolve().parent.parent / "qwq_mlx"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="session")
def names() -> Mapping[str, Any]:
    """What every example knows."""
    reasoner = qwq_mlx.load(FOLDER)
    trace = reasoner.generate("How many r in strawberry.", sampling=qwq_mlx.Sampling(temperature=0))
    return {
        **{"qwq_mlx": qwq_mlx, "Path": Path, "FOLDER": FOLDER, "open_model_folder": open_model_folder},
        **{"reasoner": reasoner, "trace": trace},
    }


PLOTTING = {"qwq_mlx.trace.plot", "qwq_mlx.generate.vote_plot"}  # need matplotlib, which not everybody installs


@pytest.mark.pocket
@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(
    module: str, names: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module in PLOTTING:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(module), extraglobs=dict(names), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", qwq_mlx.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(qwq_mlx, name)) or "")
