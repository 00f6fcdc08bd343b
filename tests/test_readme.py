"""README and docs are a contract: commands parse, Python prints what they say, links and files exist, numbers agree."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.model.memory.plan import MemoryPlan, metal_limit_bytes, plan_memory, shape_of_recipe
from qwq_mlx.quant.recipe import load_recipe, recipe_of_text

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
_COMMAND = re.compile(r"`((?:python|make|pip) [^`]+)`")
_CODE = re.compile(r"```.*?```", re.DOTALL)


def _commands() -> list[str]:
    """Every command of the README and the docs, in blocks, in running text and in tables."""
    found = []
    for text in PAGES.values():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += block.replace("\\\n", " ").splitlines()
        found += [" ".join(each.split()) for each in _COMMAND.findall(_CODE.sub("", text))]
    commands = (line.split(" #")[0].strip() for line in found)
    return sorted({line for line in commands if line})


@cache
def _help(program: tuple[str, ...]) -> str:
    if program[0] == "-m":  # in this process, which has imported it already
        with redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit) as end:
            importlib.import_module(f"{program[1]}.__main__").main(["--help"])
        assert end.value.code == 0
        return shown.getvalue()
    done = subprocess.run(
        [sys.executable, *program, "--help"], check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", _commands())
def test_every_command_exists_and_knows_its_flags(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        assert {name for each in extras for name in each.split(",")} <= set(known)
        return
    if words[0] in {"curl", "llm"}:  # clients of the server; test_real_clients.py runs what can be installed
        return
    if words[0] == "mlx.launch":  # starts a program with flags of its own
        words = words[words.index("python") :]
    assert words[0] == "python", command
    program = ("-m", words[2]) if words[1] == "-m" else (words[1],)
    if program == ("-m", "qwq_mlx"):
        return
    assert program[0] == "-m" or (REPOSITORY / program[0]).is_file(), command
    if program in {("-m", "qwq_mlx.reasoning.answer")}:
        assert len(words) == 3, "this command takes no arguments"
        return
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    shown = _help(program) if flags else ""
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}\b", shown), f"{flag} is not a flag of {' '.join(program)}"


@pytest.mark.pocket
def test_the_python_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwq_mlx import convert_checkpoint
    from qwq_mlx.pocket import FOLDER

    after = README[README.index("```python") :]
    program, printed = re.findall(r"```(?:python|text)\n(.*?)```", after, re.DOTALL)[:2]
    convert_checkpoint(FOLDER, tmp_path / "conversions" / "pocket-4bit", recipe="pocket-4bit")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_backticks_exist(page: str) -> None:
    """Paths with a folder and a suffix that this project writes; those marked as new are not there yet."""
    places = (REPOSITORY, REPOSITORY / "qwq_mlx", REPOSITORY / "docs", REPOSITORY / "qwq_mlx" / "reasoning")
    text = _CODE.sub("", PAGES[page])
    for name, rest in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|jsonl|toml|svg|yml))`([^\n]{0,6})", text):
        if rest.startswith(" (new)") or name.startswith("OUTPUT") or "NAME" in name:
            continue
        assert any((place / name).exists() for place in places), name


def test_the_macs_of_the_readme_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| (\d+) GiB \| `([\w-]+)`[^|]*\| ([\d.]+) GB \| ([\d,]+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for gib, name, size, context in rows:
        plan = _plan(name, int(gib))
        assert (f"{plan.weights_bytes / 1e9:.1f}", f"{plan.largest_context:,}") == (size, context)


def test_the_contexts_in_docs_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ((?:[\d,-]+ \| ){4}[\d,-]+) \|$", PAGES["docs/recipes.md"], re.M)
    assert len(rows) == 18
    for name, size, contexts in rows:
        plans = [_plan(name, gib) for gib in (24, 32, 36, 48, 64)]
        assert size == f"{plans[0].weights_bytes / 1e9:.1f}"
        assert contexts.split(" | ") == [f"{each.largest_context:,}" if each.largest_context else "-" for each in plans]


def _plan(name: str, gib: int) -> MemoryPlan:
    shape = shape_of_recipe(QWQ_32B_PREVIEW, load_recipe(name))
    return plan_memory(shape, limit_bytes=metal_limit_bytes(gib << 30))


def test_the_recipe_in_docs_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGES["docs/recipes.md"], re.DOTALL)
    recipe = recipe_of_text(text, path=Path("mine.toml"))
    assert recipe.packing_of("model.layers.0.self_attn.v_proj", n_layers=64) == load_recipe("mixed_4_6").packing_of(
        "model.layers.0.self_attn.v_proj", n_layers=64
    )
    assert recipe.packing_of("lm_head", n_layers=64) is None


def test_the_plot_shows_the_numbers_of_the_tables() -> None:
    """Equations solved in benchmarks/2026-11-26-recipes.json against the cells of docs/benchmarks.md."""
    data = json.loads((REPOSITORY / "benchmarks" / "2026-11-26-recipes.json").read_text(encoding="utf-8"))
    solved = {each["name"]: each["solved"] for each in data["series"]}
    text = PAGES["docs/benchmarks.md"]
    for row, name in (("that recipe", "our recipes"), ("a target size", "ours, --target-size")):
        line = next(each for each in text.splitlines() if each.startswith(f"| solved by {row} |"))
        assert [int(cell) for cell in line.split("|")[2:-1]] == list(solved[name].values())
    columns = {
        "min-max (mlx_lm.convert)": 0,
        "ours, --calibrate": 2,
        "mlx-lm GPTQ": 3,
        "mlx-lm AWQ": 4,
        "mlx-lm DWQ": 5,
    }
    for bits in (4, 3, 2):
        line = next(each for each in text.splitlines() if re.match(rf"\| {bits} bits \| \S+; ", each))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        for name, column in columns.items():
            if f"{bits}bit" in solved[name]:
                assert int(cells[column].split(";")[2]) == solved[name][f"{bits}bit"]
            else:
                assert cells[column] == "has none"
