"""Runs in a child process (`files.limited_child.LimitedForkServer`), each call in a fork: render one chat template.

Imports nothing of this package. A template that fails ends the fork with status 1, and the parent reads the last line
of stderr.

Does not: see files (the sandbox has no loader), or set its limits (the fork has them already).
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def answer(request: dict[str, Any]) -> bytes:
    """The rendered text in UTF-8. request: template, messages, tokens, and output_bytes, its characters at most."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled = environment.from_string(request["template"])
    pieces: list[str] = []
    size = 0
    for piece in compiled.generate(
        messages=request["messages"], tools=None, documents=None, add_generation_prompt=True, **request["tokens"]
    ):
        size += len(piece)
        if size > request["output_bytes"]:
            raise jinja2.TemplateError(f"wrote more than {request['output_bytes'] >> 20} MiB")
        pieces.append(piece)
    return "".join(pieces).encode()
