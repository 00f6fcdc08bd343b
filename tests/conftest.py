"""What all tests share: no network, and where optional material lies."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHAT_TEMPLATE, write_tiny_checkpoint

from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
_LOOPBACK = ("127.", "::1", "localhost")

os.environ["HF_HUB_OFFLINE"] = "1"
# A run started in the background inherits an ignored SIGINT, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Take what is imported by now out of garbage collection, which else walks it 20 times in a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that is not to this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(host, str) and self.family != socket.AF_UNIX and not host.startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to reach {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", autouse=True)
def quality_only_where_asked() -> Iterator[None]:
    """No source counts as small: measuring every conversion of the tests would take longer than the tests."""
    from qwq_mlx.convert import quality_step as judge

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SMALL_BYTES", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def tiny_template_rendered_once() -> Iterator[None]:
    """A child that renders the tiny checkpoint's template gives the same text for the same messages: start it once."""
    from qwq_mlx.model import template as module

    render = module._render_in_child
    texts: dict[str, str] = {}

    def once(template: str, messages: Any, tokens: Any) -> str:
        if template != CHAT_TEMPLATE:
            return render(template, messages, tokens)
        key = repr((messages, tokens))
        if key not in texts:
            texts[key] = render(template, messages, tokens)
        return texts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_render_in_child", once)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Optional material beside the checkout (real tokenizer, real traces); tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "qwq" / "FACTS.md").is_file():
        pytest.skip("needs the optional material in ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def official_tokenizer(shared: Path) -> Any:
    """QwQ-32B-Preview's tokenizer as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "qwq" / "tokenizer")


@pytest.fixture(scope="session")
def real_tokenizer(shared: Path) -> LoadedTokenizer:
    """QwQ-32B-Preview's tokenizer as this package reads it."""
    return load_tokenizer(shared / "qwq" / "tokenizer", vocab_size=152_064)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 checkpoint in two shards, shared by all tests: read it, never write to it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def known_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with QwQ's own chat template, which is rendered in this process: quicker where many prompts are made."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("known") / "checkpoint")
    own = json.loads((REPOSITORY / "qwq_mlx/pocket/checkpoint/tokenizer_config.json").read_text())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": own["chat_template"]}))
    return folder


@pytest.fixture(scope="session")
def pocket_reasoner() -> Any:
    """The pocket model, to compare servers with."""
    from qwq_mlx.default_model import pocket_checkpoint
    from qwq_mlx.generate.reasoner import load

    return load(pocket_checkpoint())


@pytest.fixture(scope="session")
def pocket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server (tests/serve/serving.py) of the pocket model, which answers puzzles.

    It keeps caches between requests, which spares most prompts of the tests; `cached_tokens` depends on their order.
    """
    from serving import started

    from qwq_mlx.default_model import pocket_checkpoint
    from qwq_mlx.generate.reasoner import load
    from qwq_mlx.serve.settings import Settings

    settings = Settings(port=0, name="pocket", queue=4, drain_s=5.0, runs_folder=tmp_path_factory.mktemp("runs"))
    with started(lambda: load(pocket_checkpoint()), settings) as served:
        yield served


@pytest.fixture(scope="session")
def tiny_server(known_checkpoint: Path) -> Iterator[Any]:
    """A server that writes random text until it is stopped; two rows, and two requests may wait."""
    from serving import started

    from qwq_mlx.generate.reasoner import load
    from qwq_mlx.serve.settings import Settings

    settings = Settings(port=0, name="tiny", width=2, queue=2, heartbeat_s=0.2, drain_s=5.0)
    with started(lambda: load(known_checkpoint), settings) as served:
        yield served
