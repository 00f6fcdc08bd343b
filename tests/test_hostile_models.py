"""A model folder is data: whatever code lies in it is never run, imported, unpickled or even opened.

Twelve hostile folders go through convert, verify, load and a prompt in a child process whose audit hook (PEP 578) sees
every import, exec, compile, open, connection and process; the child that renders templates is watched the same way.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import pytest
from checkpoints import write_json, write_tiny_checkpoint

PACKAGE = Path(__file__).resolve().parent.parent / "qwq_mlx"
CODE_SUFFIXES = (".py", ".pyc", ".pth", ".bin", ".pkl", ".npy", ".gguf", ".so")

# Runs before anything else in both processes. Writes a line for every event that must not be.
HOOK = """
import os, sys
HOSTILE, ALLOWED, LOG = {hostile!r}, {allowed!r}, {log!r}
log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
CODE = {suffixes!r}
CHILD = ["limited_child.py", "template_child.py"]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")

def inside(path, folders):
    path = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return path if any(path == each or path.startswith(each) for each in folders) else ""

def hook(event, arguments):
    bad = None
    if event in ("exec", "compile"):
        name = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
        bad = "" if str(name).startswith("<") else inside(name, [HOSTILE])  # <string>: dataclasses, <template>: jinja
    elif event == "import":
        bad = inside(arguments[1], [HOSTILE])
    elif event == "ctypes.dlopen":
        # a bare name is looked for in the system's folders, never here; PyTorch's CUDA build asks for libdl so
        bad = inside(arguments[0], [HOSTILE]) if "/" in str(arguments[0]) else ""
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, flags = os.fsdecode(arguments[0]), arguments[2]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not inside(path, ALLOWED) and path != os.devnull:
            bad = f"for writing: {{path}}"
        elif inside(path, [HOSTILE]) and path.endswith(CODE):
            bad = path
    elif event in CHANGES:
        is_checked_elsewhere = isinstance(arguments[0], int) or (event != "os.truncate" and arguments[-1] != -1)
        bad = "" if is_checked_elsewhere or inside(arguments[0], ALLOWED) else arguments[0]  # by its open
    elif event == "subprocess.Popen":
        # the template's own child, and what PyTorch's CUDA build asks the system when it is imported
        is_child = [str(each).rpartition("/")[2] for each in arguments[1][2:4]] == CHILD
        known = is_child or arguments[1] == ["/sbin/ldconfig", "-p"]
        bad = "" if known else str(arguments[1])
    elif event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "pickle.find_class", "pty.spawn"):
        bad = repr(arguments)
    if bad:
        os.write(log, f"{{event}} {{bad}}\\n".encode())

sys.addaudithook(hook)
"""

DRIVE = """
import json
from pathlib import Path
import qwq_mlx
from qwq_mlx.errors import PromptError, QwqError
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.verify import verify_conversion
sys.executable = {python!r}
said = {{}}
for folder in sorted(Path(HOSTILE).iterdir()):
    output = Path({out!r}) / folder.name
    qwq_mlx.convert_checkpoint(folder, output, quality=False)
    verify_conversion(output, full=True, source=folder)
    model = qwq_mlx.load(folder).model
    try:
        said[folder.name] = len(prompt_ids(model.tokenizer, "hello", context=512))
    except PromptError as error:
        said[folder.name] = str(error)
print(json.dumps(said))
"""


def evil(folder: Path, name: str) -> None:
    """Code that leaves a mark when it runs."""
    mark = folder.parent.parent / "marks" / f"{folder.name}-{name}"
    (folder / name).write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit('ran')\n")


def settings(folder: Path, name: str, **changes: object) -> None:
    value = json.loads((folder / name).read_text())
    write_json(folder / name, {**value, **changes})


class Bomb:
    """Unpickling it writes a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.mark, "w")


def auto_map(folder: Path) -> None:
    evil(folder, "modeling_evil.py")
    settings(
        folder, "config.json", auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    )


def auto_map_tokenizer(folder: Path) -> None:
    evil(folder, "tokenization_evil.py")
    auto = {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}
    settings(folder, "tokenizer_config.json", auto_map=auto, tokenizer_class="T")


def model_file(folder: Path) -> None:
    evil(folder, "evil.py")
    settings(folder, "config.json", model_file="evil.py")


def start_up(folder: Path) -> None:
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "numpy.py", "mlx.py"):
        evil(folder, name)
    (folder / "evil.pth").write_text("import sitecustomize\n")


def pickles(folder: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pkl", "scheduler.pt", "adapter_model.bin"):
        mark = folder.parent.parent / "marks" / f"{folder.name}-{name}"
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))


def arrays(folder: Path) -> None:
    (folder / "weights.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    (folder / "libevil.so").write_bytes(b"\x7fELF")


def template(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        mark = folder.parent.parent / "marks" / folder.name
        settings(folder, "tokenizer_config.json", chat_template=text.replace("MARK", str(mark)))

    return damage


FOLDERS: dict[str, Callable[[Path], None]] = {
    "auto-map": auto_map,
    "auto-map-tokenizer": auto_map_tokenizer,
    "model-file": model_file,
    "start-up": start_up,
    "pickles": pickles,
    "arrays": arrays,
    "jinja-subclasses": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "jinja-globals": template("{{ cycler.__init__.__globals__.os.system('touch MARK') }}"),
    "jinja-lipsum": template("{{ lipsum.__globals__['os'].popen('touch MARK').read() }}"),
    "jinja-function": template("{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARK') }}"),
    "jinja-include": template("{% include '/etc/passwd' %}"),
    "jinja-format": template("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}"),
}


@pytest.mark.tiny
def test_twelve_hostile_folders_are_data_to_convert_verify_load_and_prompt(tmp_path: Path) -> None:
    assert len(FOLDERS) == 12
    for name in ("marks", "out", "hostile"):
        (tmp_path / name).mkdir()
    for name, damage in FOLDERS.items():
        damage(write_tiny_checkpoint(tmp_path / "hostile" / name, n_layers=1))
    log, python = tmp_path / "log", tmp_path / "python"
    allowed = [str(tmp_path / "out"), str(log)]
    hook = HOOK.format(hostile=str(tmp_path / "hostile"), allowed=allowed, log=str(log), suffixes=CODE_SUFFIXES)
    child = f"{hook}\nimport runpy\nsys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    python.write_text(f'#!/bin/sh\nexec {quote(sys.executable)} -I {quote(str(tmp_path / "child.py"))} "$@"\n')
    python.chmod(0o700)
    (tmp_path / "child.py").write_text(child)
    drive = DRIVE.format(python=str(python), out=str(tmp_path / "out"))
    command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(PACKAGE.parent)!r}\n{hook}\n{drive}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path / "hostile" / "start-up")
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout)
    assert log.read_text() == ""
    assert list((tmp_path / "marks").iterdir()) == []
    for name, answer in said.items():
        if name.startswith("jinja"):
            assert "chat template" in answer and "failed with" in answer
        else:
            assert isinstance(answer, int)
        kept = {path.name for path in (tmp_path / "out" / name).iterdir()}
        assert not any(each.endswith(CODE_SUFFIXES) for each in kept)


def test_the_hook_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """The test above could not fail if its hook saw nothing."""
    hostile, log = tmp_path / "hostile", tmp_path / "log"
    hostile.mkdir()
    (hostile / "evil.py").write_text("pass\n")
    hook = HOOK.format(hostile=str(hostile), allowed=[], log=str(log), suffixes=CODE_SUFFIXES)
    acts = (
        f"sys.path.insert(0, {str(hostile)!r}); sys.dont_write_bytecode = True; import evil",
        f"open({str(tmp_path / 'elsewhere')!r}, 'w').close(); os.remove({str(tmp_path / 'elsewhere')!r})",
        "import socket; s = socket.socket(); s.settimeout(0.1)\ntry: s.connect(('127.0.0.1', 9))\nexcept OSError: pass",
        "import subprocess; subprocess.run(['true'])",
        "import pickle; pickle.loads(pickle.dumps(os.getcwd))",
    )
    subprocess.run([sys.executable, "-c", "\n".join((hook, *acts))], check=True)
    seen = {line.split(" ")[0] for line in log.read_text().splitlines()}
    assert {"exec", "compile", "open", "os.remove", "socket.connect", "subprocess.Popen", "pickle.find_class"} <= seen


def test_no_file_of_code_is_among_those_that_a_conversion_copies() -> None:
    from qwq_mlx.convert.plan import COPIED

    assert {Path(name).suffix for name in COPIED} == {".json", ".txt", ".jinja", ""}
