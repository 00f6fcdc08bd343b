"""The house's rules that a reader cannot check by eye: which room imports which, who prints, how long things are."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "qwq_mlx"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms in layers: a room imports itself and rooms of lower layers, also inside its functions. Within one layer nobody
# knows anybody else.
LAYERS = (
    {"errors", "facts", "progress"},
    {"files"},
    {"quant", "reasoning", "pocket", "options"},
    {"trace", "model"},
    {"quality", "engine"},
    {"convert"},
    {"default_model"},
    {"generate"},
    {"cli"},
    {"bench", "chat", "compare", "evaluate", "fit", "replay", "serve", "tune_draft", "verify"},
    {"doctor"},
)
# Commands that live in the room of what they run, and what they share with the other commands.
COMMANDS = {"generate/__main__.py", "convert/__main__.py"}
SHARED_BY_COMMANDS = {"cli"}
FORKING = {"files/limited_child.py"}  # a fork may end at once
# What runs code that a file holds, or may.
EXECUTING = {"eval", "exec", "compile", "__import__", "np.load", "numpy.load", "np.fromfile"}
UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether a broad handler raises again or hands the error it caught to somebody who will."""
    nodes = [node for statement in handler.body for node in ast.walk(statement)]
    used = any(isinstance(node, ast.Name) and node.id == handler.name for node in nodes)
    return used or any(isinstance(node, ast.Raise) for node in nodes)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _layer(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


def test_a_room_imports_only_rooms_below_it() -> None:
    for path in FILES:
        room = _room(path)
        if room in {"__init__", "__main__"}:
            continue
        for module in _imported(_tree(path)):
            parts = module.split(".")
            if parts[0] != "qwq_mlx" or parts[1] in {room, "__version__"}:
                continue
            is_shared = _name(path) in COMMANDS and parts[1] in SHARED_BY_COMMANDS
            assert is_shared or _layer(parts[1]) < _layer(room), f"{_name(path)} imports {module}"


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for path in FILES:
        without_mlx = {"errors", "facts", "files", "reasoning", "options", "trace", "pocket"}
        homes = {"mlx_lm": {"model", "engine", "bench"}, "transformers": {"model", "bench"}, "torch": set()}
        homes |= {"numba": {"quant"}, "llvmlite": {"quant"}}
        for module in _imported(_tree(path)):
            top = module.split(".")[0]
            assert top not in homes or _room(path) in homes[top], f"{_name(path)} imports {module}"
            assert top != "mlx" or _room(path) not in without_mlx, f"{_name(path)} imports {module}"


def test_only_a_main_prints_parses_or_exits() -> None:
    for path in (path for path in FILES if path.name != "__main__.py"):
        tree = _tree(path)
        names = {module.split(".")[0] for module in _imported(tree)}
        assert "argparse" not in names or _name(path) == "cli/command.py", _name(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                ends_fork = called == "os._exit" and _name(path) in FORKING
                exits = called in {"print", "exit", "quit", "sys.exit", "os._exit"}
                assert ends_fork or not exits, f"{_name(path)} calls {called}"
            assert not (isinstance(node, ast.Name) and node.id == "SystemExit"), _name(path)


def test_files_and_functions_stay_readable() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MAX_FILE_LINES, _name(path)
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef):
                docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
                length = (node.end_lineno or 0) - node.lineno + 1 - docstring
                assert length <= MAX_FUNCTION_LINES, f"{_name(path)}: {node.name} has {length} lines"
                passed_on = node.args.kwarg is not None and node.name != "__exit__"
                assert not passed_on, f"{_name(path)}: {node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"


def test_nothing_is_swallowed_and_nothing_executed() -> None:
    for path in FILES:
        assert not {module.split(".")[0] for module in _imported(_tree(path))} & UNPICKLING, _name(path)
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{_name(path)}:{node.lineno}"
                if ast.unparse(node.type) in {"Exception", "BaseException"}:
                    assert _passes_on(node), f"{_name(path)}:{node.lineno}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in EXECUTING, _name(path)
                if called == "mx.load":
                    assert any(keyword.arg == "format" for keyword in node.keywords), "the name would choose the format"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", _name(path)
        assert path.name not in {"utils.py", "helpers.py", "common.py"}, _name(path)


DOORS = ("qwq_mlx.reasoning.answer", "qwq_mlx.reasoning.loops")  # folders of which others import only the door


def test_a_folder_with_a_door_is_entered_by_the_door() -> None:
    for path in FILES:
        inside = ".".join(["qwq_mlx", *path.relative_to(PACKAGE).parts[:-1]])
        for module in _imported(_tree(path)):
            for door in DOORS:
                if inside != door and module.startswith(f"{door}."):
                    assert module.removeprefix(f"{door}.") in _exported(door), f"{_name(path)} imports {module}"


def _exported(door: str) -> list[str]:
    tree = _tree(PACKAGE.joinpath(*door.split(".")[1:], "__init__.py"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    [names] = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    return list(ast.literal_eval(names))


def test_every_room_and_file_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(_tree(path)), _name(path)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by name, and a second one of a name is an error that only the whole run shows."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_file_imports_one_that_imports_it() -> None:
    """Also not through others, and not by an import inside a function."""
    modules = {".".join(("qwq_mlx", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    arrows = {}
    for name, path in modules.items():
        imported = set(_imported(_tree(path)))
        imported |= {each.rpartition(".")[0] for each in imported}
        arrows[name] = [other for other in modules if other in imported]
    ended: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in ended:
            for other in arrows[name]:
                walk(other, (*way, name))
            ended.add(name)

    for name in modules:
        walk(name, ())
