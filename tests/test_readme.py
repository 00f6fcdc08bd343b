"""The README is a contract: its commands parse, its Python prints what it says, its files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def _commands() -> list[str]:
    """Every command of the README, in blocks and in running text."""
    lines = [line for block in _blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python|make|pip) [^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    found = [line.split(" #")[0].strip() for line in [*lines, *inline]]
    return sorted({line for line in found if line})


@cache
def _help(program: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"], check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", _commands())
def test_every_command_exists_and_knows_its_flags(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        return
    if words[0] == "pip":
        assert words[1] == "install"
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        assert {name for each in extras for name in each.split(",")} <= set(known)
        return
    assert words[0] == "python", command
    program = ("-m", words[2]) if words[1] == "-m" else (words[1],)
    if program == ("-m", "qwq_mlx"):
        return
    shown = _help(program)
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(flag)}\b", shown), f"{flag} is not a flag of {' '.join(program)}"


@pytest.mark.pocket
def test_the_python_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwq_mlx import convert_checkpoint
    from qwq_mlx.pocket import FOLDER

    after = TEXT[TEXT.index("```python") :]
    program, printed = re.findall(r"```(?:python|text)\n(.*?)```", after, re.DOTALL)[:2]
    convert_checkpoint(FOLDER, tmp_path / "conversions" / "pocket-4bit", recipe="pocket-4bit")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_every_file_that_the_readme_names_is_there() -> None:
    tree = re.search(r"## Files\n.*?```\n(.*?)```", TEXT, re.DOTALL)
    assert tree is not None
    stack: list[tuple[int, Path]] = []
    named: list[Path] = []
    for line in tree.group(1).splitlines():
        indent = len(line) - len(line.lstrip())
        while stack and stack[-1][0] >= indent:
            stack.pop()
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            named.append((stack[-1][1] if stack else REPOSITORY) / name)
        if named[-1].is_dir():
            stack.append((indent, named[-1]))
    assert len(named) > 30
    assert [str(path) for path in named if not path.exists()] == []


def test_every_room_and_script_is_in_the_list_of_files() -> None:
    listed = TEXT[TEXT.index("## Files") :]
    rooms = [path.parent.name for path in (REPOSITORY / "qwq_mlx").glob("*/__init__.py")]
    scripts = [path.name for path in (REPOSITORY / "scripts").glob("*.py")]
    assert [name for name in [*rooms, *scripts] if name not in listed] == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (REPOSITORY / target).exists(), target
