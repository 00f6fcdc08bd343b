"""One question to a server by each of its interfaces, and the thinking and the answer in what comes back.

The scripts that load a server ask with it, so that each interface must give the same texts. Not a script of its own.

Does not: send anything (the scripts do, and leave midway).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

__all__ = ["INTERFACES", "RUNS", "Question", "asked", "told"]

INTERFACES = ("chat", "stream", "responses", "messages", "ollama", "generate", "run")
RUNS = "/api/qwq/runs"


class Question(NamedTuple):
    """What is asked. seed: None draws nothing (temperature 0). penalty: of repetition, None for none."""

    text: str
    max_tokens: int
    seed: int | None = None
    penalty: float | None = None

    def has(self, interface: str) -> bool:
        """Whether that interface knows all of it: Anthropic's has no seed, and two have no penalty."""
        return not (
            (interface == "messages" and self.seed is not None)
            or (interface in ("messages", "responses") and self.penalty is not None)
        )


def asked(interface: str, model: str, question: Question) -> tuple[str, dict[str, Any]]:
    """Path and body of the request."""
    messages = [{"role": "user", "content": question.text}]
    sampling: dict[str, Any] = (
        {"temperature": 0} if question.seed is None else {"temperature": 1, "seed": question.seed}
    )
    if question.penalty is not None:
        sampling["repetition_penalty"] = question.penalty
    if interface in ("chat", "stream"):
        body = {"messages": messages, "max_tokens": question.max_tokens, "stream": interface == "stream", **sampling}
        return "/v1/chat/completions", {"model": model, **body}
    if interface == "responses":
        return "/v1/responses", {
            "model": model,
            "input": question.text,
            "max_output_tokens": question.max_tokens,
            **sampling,
        }
    if interface == "messages":
        thinking = {"thinking": {"type": "enabled"}}
        return "/v1/messages", {
            "model": model,
            "messages": messages,
            "max_tokens": question.max_tokens,
            **thinking,
            **sampling,
        }
    if interface == "run":
        return RUNS, {"question": question.text, "max_tokens": question.max_tokens, "alternatives": 3, **sampling}
    options = {"num_predict": question.max_tokens, **sampling}
    if "repetition_penalty" in options:
        options["repeat_penalty"] = options.pop("repetition_penalty")
    body = {"model": model, "stream": False, "options": options}
    if interface == "generate":
        return "/api/generate", {**body, "prompt": question.text}
    return "/api/chat", {**body, "messages": messages}


def told(interface: str, raw: bytes) -> tuple[str | None, str]:
    """The thinking and the answer; of a run's steps all text as the answer.

    None for the thinking of a stream, which may hold the beginning of the answer, too (docs/clients.md).
    """
    if interface == "stream":
        chunks = [json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")]
        return None, "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    if interface == "run":
        lines = [json.loads(line) for line in raw.splitlines() if line]
        return None, "".join(line["text"] for line in lines if "text" in line)
    value = json.loads(raw)
    if interface == "chat":
        message = value["choices"][0]["message"]
        return message["reasoning"], message["content"]
    if interface == "responses":
        texts = [item["content"][0]["text"] for item in value["output"] if item["type"] == "message"]
        thoughts = [item["summary"][0]["text"] for item in value["output"] if item["type"] == "reasoning"]
        return "".join(thoughts), "".join(texts)
    if interface == "messages":
        blocks = value["content"]
        return tuple("".join(block.get(kind, "") for block in blocks) for kind in ("thinking", "text"))  # type: ignore[return-value]
    message = value if interface == "generate" else value["message"]
    return message.get("thinking", ""), message["response" if interface == "generate" else "content"]
