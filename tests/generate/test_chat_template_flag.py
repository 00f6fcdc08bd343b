"""A chat template of the user's own: in a conversion, or for one run, with its digest in what the run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwq_mlx.convert import __main__ as convert
from qwq_mlx.errors import LoadError, PromptError
from qwq_mlx.files.manifest import read_manifest, verify_full
from qwq_mlx.generate import __main__ as generate
from qwq_mlx.generate.reasoner import load
from qwq_mlx.options import Limits, Sampling

pytestmark = pytest.mark.tiny
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}!{{ m['content'] }}{% endfor %}"
LIMITS = ["--temp", "0", "--max-tokens", "2", "--no-save", "-p", "Hi"]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def bare(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A checkpoint without a template."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_conversion_has_the_template_and_the_warning_comes_once(
    bare: Path, template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--source", str(bare), "--output", str(out), "--no-quality"]
    assert convert.main([*flags, "--dry-run"]) == 0
    assert "will not answer questions. Give one as --chat-template: chat_template.jinja" in capfd.readouterr().err
    assert convert.main([*flags, "--chat-template", str(template)]) == 0
    assert capfd.readouterr().err.count("is none that this package knows") == 1
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template.jinja" in verify_full(out).files
    assert "chat_template.jinja" not in read_manifest(out).source.files
    assert generate.main([*LIMITS, "--model", str(out)]) == 0
    assert "is none that this package knows" not in capfd.readouterr().err


def test_a_run_has_the_template_and_its_digest(
    bare: Path, template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([*LIMITS, "--model", str(bare)]) == 1
    assert "Give one as --chat-template" in capfd.readouterr().err
    assert generate.main([*LIMITS, "--model", str(bare), "--chat-template", str(template)]) == 0
    reasoner = load(bare, chat_template=template)
    trace = reasoner.generate("Hi", sampling=Sampling(temperature=0), limits=Limits(max_tokens=2))
    assert reasoner.decode(list(trace.prompt_ids)) == "<|im_start|>user!Hi"
    other = load(bare, chat_template=_written(tmp_path / "b.jinja", TEMPLATE + "."))
    assert reasoner.receipt(trace).template_sha256 != other.receipt(trace).template_sha256
    questions, answers = _written(tmp_path / "q.jsonl", '{"question": "Hi"}\n'), tmp_path / "a.jsonl"
    batch = ["--model", str(bare), "--input", str(questions), "--output", str(answers), "--max-tokens", "2"]
    assert generate.main([*batch, "--chat-template", str(template)]) == 0
    assert generate.main([*batch, "--chat-template", str(tmp_path / "b.jinja")]) == 2
    assert "other values of template_sha256" in capfd.readouterr().err


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{% for m in %}", PromptError, "failed with .*TemplateSyntaxError"),
        ("x" * (2 << 20), LoadError, "has 2,097,152 bytes, expected at most 1,048,576"),
        (None, LoadError, "cannot be read"),
    ],
)
def test_what_is_no_template_is_refused_before_the_model_is_read(
    bare: Path, tmp_path: Path, text: str | None, error: type[Exception], match: str
) -> None:
    path = tmp_path / "bad.jinja" if text is None else _written(tmp_path / "bad.jinja", text)
    with pytest.raises(error, match=match):
        load(bare, chat_template=path)
