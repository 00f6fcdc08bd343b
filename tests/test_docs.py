"""The generated parts of the docs are current: commands, Python API, answer rules."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts_as_modules import script_module

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    return script_module("make_docs")


@pytest.mark.parametrize("name", ["cli.md", "api.md", "answers.md"])
def test_a_generated_page_is_current(make_docs: ModuleType, name: str) -> None:
    """Word by word: Python's versions break the lines of a usage differently."""
    kept = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert kept.split() == make_docs.current(name).split(), f"docs/{name} is not current: run make docs"


def test_every_command_and_public_name_has_its_place(make_docs: ModuleType) -> None:
    import qwq_mlx

    assert list(make_docs.GENERATORS) == ["cli.md", "api.md", "answers.md"]
    commands = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    for path in (REPOSITORY / "qwq_mlx").glob("*/__main__.py"):
        assert f"\n## {path.parent.name}\n" in commands
    names = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    for name in qwq_mlx.__all__:
        assert f"\n### {name}\n" in names


def test_a_docstring_becomes_markdown(make_docs: ModuleType) -> None:
    lines = "What it does.\n\nn: how many.\n  And more.\nRaises it.\n\n>>> 1 + 1\n2"
    assert list(make_docs._prose(lines)) == [
        *("What it does.", "", "- `n`: how many.", "  And more.", "", "Raises it.", ""),
        *("```python", ">>> 1 + 1", "2", "```", ""),
    ]


def test_options_are_written_as_python_3_13_does(make_docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown:
        stdout = "-p TEXT, --prompt TEXT  the question\n--model DIR  the model"

    monkeypatch.setattr(make_docs.subprocess, "run", lambda *_, **__: Shown)
    assert make_docs._help("any") == "-p, --prompt TEXT  the question\n--model DIR  the model"
