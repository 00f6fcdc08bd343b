"""Clients as users install them, each in its own process and environment, against one server of the pocket model.

Every client has to show the engine's answer and thinking, each once, the usage, and the same of a stream; and where it
leaves midway, the row is free before the answer would have come to its end. `make clients` installs them, from
constraints.txt and package-lock.json in clients/, and names their folder in $QWQ_MLX_CLIENTS; else these are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import QUESTION, Served, started, until

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Sampling
from qwq_mlx.serve.rows import Rows
from qwq_mlx.serve.settings import Settings
from qwq_mlx.trace.trace import Trace

FOLDER = Path(os.environ.get("QWQ_MLX_CLIENTS", "/nowhere"))
pytestmark = [
    pytest.mark.pocket,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the clients (make clients)"),
]

SCRIPTS = Path(__file__).with_name("clients")
LEFT = 0.01  # the temperature by which the scripts mark what they leave
N_BEFORE = 5  # tokens of it that are written before the client leaves
PYTHON = (
    *("openai_chat", "openai_responses", "anthropic", "ollama", "litellm", "langchain_openai", "langchain_ollama"),
    *("pydantic_ai", "llm", "inspect_ai", "lm_eval"),
)
NODE = ("openai_js", "anthropic_js", "ollama_js", "ai_sdk")
SHOWS_NO_THINKING = {  # what these clients leave out, by their own choice; docs/clients.md says so
    ("langchain_openai", "chat.completions"),
    ("llm", "own"),
    ("lm_eval", ""),
}
OWN_PROMPT = ("litellm", "ollama"), f"### User:\n{QUESTION}\n\n"  # written in place of the chat template


@pytest.fixture(scope="module")
def served(pocket_reasoner: Reasoner) -> Iterator[Served]:
    """A server that holds an answer that is to be left until its client has left it."""
    step = Rows.step

    def held_step(rows: Rows) -> None:
        for choice in rows._choices:
            if choice.stream.request.sampling.temperature == LEFT and len(choice.stream.run.steps) >= N_BEFORE:
                until(lambda job=choice.job: job.is_cancelled)
        step(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "step", held_step)
        with started(lambda: pocket_reasoner, Settings(port=0, name="pocket")) as served:
            yield served


@pytest.fixture(scope="module")
def traces(pocket_reasoner: Reasoner) -> dict[str, Trace]:
    """What the engine writes for each prompt."""
    cold = Sampling(temperature=0)
    return {question: pocket_reasoner.generate(question, sampling=cold) for question in (QUESTION, OWN_PROMPT[1])}


@pytest.mark.parametrize("client", [*PYTHON, *NODE])
def test_a_client_shows_all_once_and_frees_the_row_that_it_leaves(
    client: str, served: Served, traces: dict[str, Trace], tmp_path: Path
) -> None:
    _need_npm(client in NODE)
    worker = served.server.worker
    left_before, n_parts = worker.counters.left, 0
    for part, told in _asked(client, served.url, tmp_path / "stderr"):
        if part in ("whole", "stream"):
            who = client, told.pop("provider", "")
            trace = traces[OWN_PROMPT[1] if who == OWN_PROMPT[0] else QUESTION]
            assert (told.pop("thinking", None) or "").strip() == _thinking(who, part, trace).strip(), (who, part)
            assert told.pop("answer") == trace.conclusion, (who, part)
            assert told.pop("prompt_tokens", None) in (None, len(trace.prompt_ids)), (who, part)
            assert told.pop("output_tokens", None) in (None, len(trace.ids)), (who, part)
            assert not told
            n_parts += 1
        elif part == "left":
            until(lambda: served.is_idle)
        elif part == "to be ended":
            until(lambda: worker.n_running > 0)
    until(lambda: served.is_idle)
    assert n_parts >= (1 if client == "lm_eval" else 2)
    until(lambda: worker.counters.left > left_before)  # the server noticed, also where the row had not begun
    assert worker.counters.failed == 0


def _documented() -> list[Any]:
    """Language and lines of each code that docs/clients.md has for a client, with its heading."""
    text = (SCRIPTS.parents[2] / "docs" / "clients.md").read_text()
    sections = text[text.index("\n## Clients\n") :].split("\n### ")[1:]
    blocks = [(each.partition("\n")[0], re.search(r"```(python|js|sh)\n(.*?)```", each, re.S)) for each in sections]
    return [pytest.param(block[1], block[2], id=heading) for heading, block in blocks if block is not None]


@pytest.mark.parametrize(("language", "lines"), _documented())
def test_the_documented_lines_of_a_client_print_an_answer(
    language: str, lines: str, served: Served, tmp_path: Path
) -> None:
    _need_npm(language == "js")
    program, suffix = {"python": ("python", "py"), "js": ("node", "mjs"), "sh": ("sh", "sh")}[language]
    environment = {"PATH": f"{FOLDER / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    with _beside_packages(
        lines.replace("http://127.0.0.1:8080", served.url).replace("NAME", "pocket"), suffix
    ) as script:
        command = [program, str(script)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2_000:]


def _need_npm(is_needed: bool) -> None:
    if is_needed and not (FOLDER / "npm" / "node_modules").is_dir():
        pytest.skip("npm could not install its clients")


@contextmanager
def _beside_packages(lines: str, suffix: str) -> Iterator[Path]:
    """A file of them in the folder where node looks for packages."""
    with tempfile.NamedTemporaryFile("w", suffix=f".{suffix}", dir=FOLDER / "npm") as file:
        file.write(lines)
        file.flush()
        yield Path(file.name)


def _thinking(who: tuple[str, str], part: str, trace: Trace) -> str:
    """What a client is to show of it. A text without any mark is an answer, which a stream shows twice."""
    if not trace.thinking and part == "stream":
        return trace.text
    return "" if who in SHOWS_NO_THINKING else trace.thinking


def _asked(client: str, url: str, log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a client's script tells; it lives until the last of it was looked at. log: for its stderr."""
    suffix = "mjs" if client in NODE else "py"
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with (
        _beside_packages((SCRIPTS / f"ask.{suffix}").read_text(), suffix) as script,
        log.open("w") as stderr,
        subprocess.Popen(
            [str(FOLDER / "bin" / ("node" if client in NODE else "python")), str(script), client, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**environment, "PYTHONWARNINGS": "ignore"},
        ) as process,
    ):
        assert process.stdout is not None, "it is a pipe"
        try:
            for line in process.stdout:
                part, told = json.loads(line)
                yield part, told
                if part in ("left", "to be ended"):
                    return
            raise AssertionError(f"{client} ended early: {log.read_text()[-3_000:]}")
        finally:
            process.kill()
