"""Chat templates: the known ones as Python, any other as jinja in a child process with limits.

A checkpoint's template is a program from a stranger: it can loop for years or build gigabytes, and jinja's sandbox does
not stop either. The template of QwQ-32B-Preview is therefore known by its sha256 and written out here as a function; an
unknown one is rendered by `template_child.py` with 2 s of CPU, 30 s of wall time, 256 MB of memory and 64 MB of output.
One child serves all prompts (its start takes 0.1 to 0.3 s), and renders each in a fork that has these limits.

Does not: tokenize, or decide what a user's text may become (`model.prompt` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qwq_mlx.errors import PromptError, TemplateLimitError
from qwq_mlx.files.limited_child import LimitedForkServer
from qwq_mlx.model.tokenizer import MAX_TEMPLATE_BYTES, read_text_file

__all__ = ["KNOWN_TEMPLATES", "is_known", "read_template_file", "render", "template_digest", "template_warning"]

CHILD_CPU_S = 2
CHILD_WALL_S = 30.0  # looping is ended by the CPU limit; a busy machine takes long only to start the child
CHILD_MEMORY_BYTES = 256 << 20
CHILD_OUTPUT_BYTES = 64 << 20
_CHILD = LimitedForkServer(Path(__file__).with_name("template_child.py"))

_PREVIEW_SYSTEM = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)


def _qwq_preview(messages: Sequence[Mapping[str, str]]) -> str:
    """The template of QwQ-32B-Preview without tools, with the generation prompt."""
    parts = []
    if messages[0]["role"] != "system":
        parts.append(f"<|im_start|>system\n{_PREVIEW_SYSTEM}<|im_end|>\n")
    parts += [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    parts.append("<|im_start|>assistant\n")
    return "".join(parts)


KNOWN_TEMPLATES: Mapping[str, Callable[[Sequence[Mapping[str, str]]], str]] = {
    # chat_template of Qwen/QwQ-32B-Preview's tokenizer_config.json; the pocket model carries the same text
    "8523238ee7675c71ff297fb3bf4c48da234104b209663a3f63e7eeeef4ca7685": _qwq_preview,
}


def template_digest(template: str) -> str:
    """sha256 of the template's text, by which it is known; a final newline does not count (editors add and drop it)."""
    return hashlib.sha256(template.removesuffix("\n").encode("utf-8", "surrogatepass") + b"\n").hexdigest()


def is_known(template: str) -> bool:
    """Whether the template is rendered by this package's own code."""
    return template_digest(template) in KNOWN_TEMPLATES


def template_warning(template: str | None) -> str | None:
    """What to tell whoever will have prompts written by a template; None where it is known, or there is none."""
    if template is None or is_known(template):
        return None
    return (
        f"the chat template (sha256 {template_digest(template)}) is none that this package knows. It is a program of "
        "the model's source that writes every prompt; it runs in a process of its own, with limits. Compare it with "
        "the publisher's."
    )


def read_template_file(path: Path) -> str:
    """A chat template from a file of its own, tried on one message.

    Raises LoadError for a file that cannot be one (1 MiB at most, UTF-8); PromptError as `render` does.
    """
    template = read_text_file(path, MAX_TEMPLATE_BYTES)
    render(template, [{"role": "user", "content": "Hi"}], {})
    return template


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
    """The conversation as one text that ends where the assistant begins.

    messages: role and content, checked by `model.prompt`. tokens: bos_token, eos_token ... for unknown templates.
    Raises PromptError when an unknown template fails or refuses the messages; TemplateLimitError, which is one, when it
    exceeds its limits.
    """
    known = KNOWN_TEMPLATES.get(template_digest(template))
    return known(messages) if known is not None else _render_in_child(template, messages, tokens)


def _render_in_child(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
    label = f"chat template (sha256 {template_digest(template)[:12]}…)"
    advice = "Take the chat template from the model's source again, or use a conversion of QwQ-32B-Preview."
    child = _CHILD.ask(
        {
            "template": template,
            "messages": list(messages),
            "tokens": dict(tokens),
            "output_bytes": CHILD_OUTPUT_BYTES,
        },
        cpu_s=CHILD_CPU_S,
        memory_bytes=CHILD_MEMORY_BYTES + len(template) * 64,
        wall_s=CHILD_WALL_S,
    )
    if child is None:
        raise TemplateLimitError(f"{label}: did not finish within {CHILD_WALL_S:g} s. {advice}")
    if child.returncode == 0:
        return child.stdout.decode()
    if child.returncode == 1 and child.stderr.strip():
        reason = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1][:300]
        raise PromptError(f"{label}: failed with {reason}. {advice}")
    limit = f"{CHILD_CPU_S} s of CPU and {CHILD_MEMORY_BYTES >> 20} MiB"
    raise TemplateLimitError(f"{label}: was ended by its limits ({limit}; exit status {child.returncode}). {advice}")
