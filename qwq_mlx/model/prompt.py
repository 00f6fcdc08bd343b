"""Messages become ids, and only the template's own text becomes control tokens.

A user who types `<|im_end|>` gets the characters `<`, `|`, ... and not the id that ends a turn. Three steps: (1) in the
content of the messages every text of an added token is broken by a mark that no message contains; (2) the template is
rendered with that content; (3) the result is cut at the control texts that are left, which only the template can have
written; what lies between loses its marks and is encoded by a tokenizer that has no added tokens. For messages without
such texts the ids are those of the official template, token for token. What an assistant said earlier keeps the added
tokens that are not special (`</think>`): the model wrote them, and templates cut there.

Does not: shorten a prompt that is too long, invent roles, or send tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from qwq_mlx.errors import PromptError
from qwq_mlx.model.template import render
from qwq_mlx.model.tokenizer import LoadedTokenizer

__all__ = ["ROLES", "Messages", "conversation", "encode_prompt", "encode_text", "prompt_ids"]

Messages = str | Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")
_MAX_CHARACTERS = 16_000_000  # 1 MB of pasted text is fine; beyond this nothing fits any context


def prompt_ids(
    tokenizer: LoadedTokenizer, messages: Messages, *, system_prompt: str | None = None, context: int
) -> list[int]:
    """Ids of the prompt that messages make: `conversation`, then `encode_prompt`. Raises PromptError as they do."""
    return encode_prompt(tokenizer, conversation(messages, system_prompt=system_prompt), context=context)


def encode_prompt(tokenizer: LoadedTokenizer, checked: Sequence[Mapping[str, str]], *, context: int) -> list[int]:
    """Ids of the whole prompt, which ends where the assistant begins.

    checked: what `conversation` returned.
    context: positions there are; the prompt must leave at least one of them.
    Raises PromptError: too long, or template trouble.
    """
    if tokenizer.chat_template is None:
        raise PromptError(
            "The model folder has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja). "
            "Give one as `chat_template`, or copy tokenizer_config.json from the model's source."
        )
    mark = _unused_mark(message["content"] for message in checked)
    control = _pattern(tokenizer.added)
    of_role = {"system": control, "user": control, "assistant": _pattern(tokenizer.special)}
    broken = [
        {"role": role, "content": of_role[role].sub(lambda match: _break(match[0], mark), content)}
        for role, content in ((message["role"], message["content"]) for message in checked)
    ]
    text = render(tokenizer.chat_template, broken, _named_tokens(tokenizer))
    ids: list[int] = []
    for piece in control.split(text):
        token_id = tokenizer.added.get(piece)
        ids += [token_id] if token_id is not None else encode_text(tokenizer, piece.replace(mark, ""))
    if len(ids) >= context:
        raise PromptError(
            f"The prompt is {len(ids):,} tokens, the context is {context:,} and must hold at least one more. "
            "Shorten the prompt."
        )
    return ids


def conversation(messages: Messages, *, system_prompt: str | None = None) -> list[dict[str, str]]:
    """Messages as a list of role and content, all checked.

    messages: a question, or messages with "role" (system, user, assistant) and "content".
    system_prompt: put first.
    Raises PromptError: empty, unknown role, content that is no text, lone surrogates, too long.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"The prompt is {messages!r:.80}, expected a question or a list of messages with at least one."
        )
    if system_prompt is not None:
        if isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
            raise PromptError("There is a system prompt and a system message; give one of them.")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    checked = [_checked(index, message) for index, message in enumerate(cast("Sequence[object]", messages))]
    if not any(message["role"] == "user" for message in checked):
        raise PromptError("No message has the role 'user'; expected a question.")
    n_characters = sum(len(message["content"]) for message in checked)
    if n_characters > _MAX_CHARACTERS:
        raise PromptError(
            f"The prompt has {n_characters:,} characters, expected at most {_MAX_CHARACTERS:,}. Shorten it."
        )
    return checked


def _checked(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise PromptError(f'Message {index} is {message!r:.80}, expected {{"role": ..., "content": ...}}.')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"Message {index} has the role {role!r:.80}, expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise PromptError(f"Message {index}: the content is {type(content).__name__}, expected a text.")
    if role == "user" and not content.strip():
        raise PromptError("The prompt is empty. Give a question, for example 'How many r in strawberry?'.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"Message {index}: character {error.start:,} is the lone surrogate U+{ord(content[error.start]):04X}, "
            "which is no text (often bytes that are not UTF-8). Give the prompt as UTF-8."
        ) from error
    return {"role": role, "content": content}


def encode_text(tokenizer: LoadedTokenizer, text: str) -> list[int]:
    """Ids of a text in which added tokens mean nothing: `<|im_end|>` is characters.

    Raises PromptError where the tokenizer's own vocabulary holds a control token.
    """
    ids: list[int] = tokenizer.plain.encode(text, add_special_tokens=False).ids
    markers = set(tokenizer.added.values()).intersection(ids)
    if markers:
        raise PromptError(
            f"The tokenizer turns ordinary text into the control ids {sorted(markers)[:5]}; its vocabulary holds "
            "control tokens as ordinary ones. Take tokenizer.json from the model's source again."
        )
    return ids


def _pattern(added: Iterable[str]) -> re.Pattern[str]:
    """One group, so that `split` keeps what it cuts at; the longest text first, so that none hides in another."""
    texts = sorted(added, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("((?!))")


def _break(text: str, mark: str) -> str:
    return text[:1] + mark + text[1:]


def _unused_mark(contents: Iterable[str]) -> str:
    """A short text of private-use characters that stands in none of the contents."""
    contents = list(contents)
    number = 0
    while True:
        digits = "".join(chr(0xE100 + int(digit)) for digit in str(number))
        mark = f"\ue000{digits}\ue001"
        if not any(mark in content for content in contents):
            return mark
        number += 1


def _named_tokens(tokenizer: LoadedTokenizer) -> dict[str, str]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    values = {name: getattr(tokenizer.hf, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
