"""Runs as a child process of its own: render one chat template under limits of CPU and memory.

Reads one JSON object on stdin, writes the text on stdout in UTF-8. Started by `model.template` with `python -I`, so
that neither the current folder nor the environment is on the path; imports nothing of this package. A template that
fails ends the child with status 1, and the parent reads the last line of stderr.

Does not: see files (the sandbox has no loader), or raise its own limits again. On macOS the memory limit is advisory
(not measured there); the CPU limit and the parent's clock hold.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any


def _limit(cpu_s: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        try:
            resource.setrlimit(kind, (memory_bytes, memory_bytes))
        except (OSError, ValueError):  # macOS refuses limits below what is mapped already
            continue


def _render(request: dict[str, Any]) -> str:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    return "".join(pieces)


def _main() -> None:
    request = json.load(sys.stdin)
    _limit(request["cpu_s"], request["memory_bytes"] + len(request["template"]) * 64)
    sys.stdout.buffer.write(_render(request).encode())


if __name__ == "__main__":
    _main()
