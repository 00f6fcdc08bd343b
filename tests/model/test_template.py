"""Chat templates: the known one equals jinja's rendering; a stranger's is rendered, refused, or ended by its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import PromptError, TemplateLimitError
from qwq_mlx.files import limited_child
from qwq_mlx.model import template
from qwq_mlx.model.template import KNOWN_TEMPLATES, is_known, render, template_digest
from qwq_mlx.model.tokenizer import load_tokenizer

CONVERSATIONS = (
    [{"role": "user", "content": "How many r in strawberry?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " a\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "c"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ],
)
USER = CONVERSATIONS[0]


def preview_template(shared: Path) -> str:
    return (shared / "qwq" / "chat_template.jinja").read_text()


def test_the_known_template_is_the_published_one(shared: Path) -> None:
    text = preview_template(shared)
    assert is_known(text)
    assert is_known(text.removesuffix("\n")) == is_known(text.removesuffix("\n") + "\n")
    assert not is_known(text + "x")


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_known_template_writes_what_jinja_writes(
    shared: Path, official_tokenizer: Any, messages: list[dict[str, str]]
) -> None:
    expected = official_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = preview_template(shared)
    assert render(text, messages, {}) == expected
    assert template._render_in_child(text, messages, {}) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_an_unknown_template_is_rendered_as_transformers_does(
    tiny_checkpoint: Path, messages: list[dict[str, str]]
) -> None:
    from transformers import AutoTokenizer

    text = load_tokenizer(tiny_checkpoint, vocab_size=320).chat_template or ""
    assert not is_known(text)
    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert render(text, messages, {}) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_the_digests_are_of_the_text_with_one_final_newline() -> None:
    assert template_digest("a") == template_digest("a\n") != template_digest("a\n\n")
    assert all(len(digest) == 64 for digest in KNOWN_TEMPLATES)


def test_many_prompts_of_unknown_templates_start_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = [], limited_child.subprocess.Popen

    def start(*arguments: Any, **settings: Any) -> Any:
        started.append(arguments)
        return real(*arguments, **settings)

    template._CHILD.close()  # of the tests before
    monkeypatch.setattr(limited_child.subprocess, "Popen", start)
    texts = [
        render(text, messages, {}) for text in ("{{ messages | length }}", "{{ 7 }}") for messages in CONVERSATIONS
    ]
    assert texts == ["1", "2", "4", "3", *"7777"]
    assert len(started) == 1


def test_tokens_and_jinja_extras_reach_the_template() -> None:
    text = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    assert render(text, CONVERSATIONS[2], {"bos_token": "<s>"}) == '<s>{"role": "user", "content": "a"}'
    assert render("{{ strftime_now('%Y') }}", USER, {}).isdigit()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('only pairs') }}", r"failed with jinja2\.exceptions\.TemplateError: only pairs"),
        ("{% for m in messages %}", r"failed with jinja2\.exceptions\.TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "failed with ZeroDivisionError"),
        (
            "{{ ''.__class__.__mro__ }}",
            r"failed with jinja2\.exceptions\.SecurityError: access to attribute '__class__'",
        ),
        ("{{ messages.append(1) }}", r"failed with jinja2\.exceptions\.SecurityError"),
        ("{% include '/etc/passwd' %}", "failed with TypeError: no loader"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", r"failed with jinja2\.exceptions\."),
        ("{{ 'x' * 3000000000 }}", "failed with MemoryError"),
        (
            "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
            "failed with .*TemplateError: wrote more than 64 MiB",
        ),
        ("{{ '\\ud800' }}", "failed with UnicodeEncodeError"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(text: str, reason: str) -> None:
    with pytest.raises(
        PromptError, match=rf"chat template \(sha256 {template_digest(text)[:12]}…\): {reason}.*Take the"
    ):
        render(text, USER, {})


def test_a_template_that_loops_is_ended_by_its_cpu_limit() -> None:
    text = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(
        TemplateLimitError, match=r"was ended by its limits \(2 s of CPU and 256 MiB; exit status -24\)"
    ):
        render(text, USER, {})


def test_a_template_that_outlives_the_clock_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "CHILD_WALL_S", 0.5)
    text = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match=r"did not finish within 0\.5 s"):
        render(text, USER, {})
