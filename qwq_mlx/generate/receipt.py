"""A receipt of one run: all that its ids follow from, and the ids, so that anybody can run it again and compare.

    model       name, sha256 of its files (its manifest, where it has one), weights, compute type
    tokenizer_sha256, template_sha256, question, prompt_ids
    settings    sampling with the seed, limits, thinking; "logits_hook" or "forked_at" where a file cannot say it all
    ids, finish_reason, injections, and digests of prompt ids, ids and text
    versions, backend, system

The file ends with a sha256 of all the rest, so an edited receipt is refused.

Does not: hold the text (its digest is there), or times.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SavingError, SourceError, system_said
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.digest import sha256_json
from qwq_mlx.files.json_dataclass import FieldError, from_json_value, shown
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.upstream import package_version
from qwq_mlx.options import from_json
from qwq_mlx.trace.trace import Injection, Trace

__all__ = ["Receipt", "here", "make_receipt", "read_receipt", "text_digest"]

_FORMAT, _SCHEMA = "qwq_mlx receipt", 2  # 1: the noise of a draw was tied to a place, not to an id
_PACKAGES = ("qwq-mlx", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
_MAX_BYTES = 64 << 20  # 32,768 ids take 0.3 MB
_ADVICE = "Give a receipt of a run."


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """All that the ids of a run follow from, and the ids.

    model: name, sha256 of its files, weights, compute type.
    tokenizer_sha256: of tokenizer.json.
    template_sha256: of the chat template.
    question: as in the Trace.
    prompt_ids: ids of the whole prompt.
    prompt_sha256: of prompt_ids.
    settings: sampling with the seed, limits, thinking; the system prompt; and by name what no file can hold.
    ids: what came out.
    ids_sha256: of ids.
    text_sha256: of the text.
    finish_reason: as in the Trace.
    injections: as in the Trace.
    versions: package -> version, "none" where it is not installed.
    backend: of MLX.
    system: operating system and machine.

    >>> receipt = reasoner.receipt(trace)
    >>> receipt.save("run.json")
    >>> read_receipt("run.json") == receipt, reasoner.rerun(receipt).is_finished
    (True, False)
    """

    model: Mapping[str, Any]
    tokenizer_sha256: str
    template_sha256: str
    question: str
    prompt_ids: tuple[int, ...]
    prompt_sha256: str
    settings: Mapping[str, Any]
    ids: tuple[int, ...]
    ids_sha256: str
    text_sha256: str
    finish_reason: str
    injections: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    backend: str
    system: str

    def save(self, path: str | Path) -> None:
        """Write it as JSON; it appears whole or not at all. Raises SavingError where the disk does not take it."""
        values = {"format": _FORMAT, "schema_version": _SCHEMA, **asdict(self)}
        values["sha256"] = sha256_json(values)
        try:
            write_file(Path(path), (json.dumps(values, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise SavingError(
                f"{path}: the receipt cannot be saved {system_said(error, 'Make room, or give another place.')}", error
            ) from error


def make_receipt(model: LoadedModel, trace: Trace) -> Receipt:
    """The receipt of a trace that this model wrote. Hashes the model's files, unless they have a manifest."""
    return Receipt(
        model={**trace.model, "sha256": model_digest(model.folder)},
        question=trace.question,
        prompt_ids=trace.prompt_ids,
        prompt_sha256=_ids_digest(trace.prompt_ids),
        settings=trace.settings,
        ids=trace.ids,
        ids_sha256=_ids_digest(trace.ids),
        text_sha256=text_digest(trace.text),
        finish_reason=trace.finish_reason,
        injections=tuple(asdict(each) for each in trace.injections),
        **here(model),
    )


def here(model: LoadedModel) -> dict[str, Any]:
    """What a receipt says of tokenizer, template, versions and machine, for a model loaded here."""
    tokenizer = (model.folder / "tokenizer.json").read_bytes()
    return {
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "template_sha256": text_digest(model.tokenizer.chat_template or ""),
        "versions": {**{name: package_version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "backend": backend_name(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def read_receipt(path: str | Path) -> Receipt:
    """What `Receipt.save` wrote. Raises SourceError naming the file and the fault."""
    values = read_json_object(Path(path), limit_bytes=_MAX_BYTES, advice=_ADVICE)
    if values.get("format") != _FORMAT or values.get("schema_version") != _SCHEMA:
        raise SourceError(
            f"{path}: is {values.get('format')!r} of schema {values.get('schema_version')!r}, expected "
            f"{_FORMAT!r} of schema {_SCHEMA}. "
            + (_ADVICE if values.get("format") != _FORMAT else "Repeat it with the version of qwq_mlx that wrote it.")
        )
    sealed = values.pop("sha256", None)
    if sealed != sha256_json(values):
        raise SourceError(f"{path}: the sha256 does not fit, so the receipt is damaged or edited. {_ADVICE}")
    del values["format"], values["schema_version"]
    try:
        receipt = from_json_value(values, Receipt)
        _check(receipt)
    except FieldError as error:
        raise SourceError(f"{path}: {error}. {_ADVICE}") from error
    from_json(receipt.settings, where=str(path))
    return receipt


def _check(receipt: Receipt) -> None:
    """Raises FieldError for what the classes of the fields do not say."""
    for name in ("name", "weights", "compute_type", "sha256"):
        if not isinstance(receipt.model.get(name), str):
            raise FieldError(f"model.{name}", shown(receipt.model.get(name)), "a text")
    if not isinstance(receipt.settings.get("system_prompt", ""), str):
        raise FieldError("settings.system_prompt", shown(receipt.settings["system_prompt"]), "a text")
    for index, each in enumerate(receipt.injections):
        from_json_value(each, Injection, where=f"injections[{index}]")
    for name, ids in (("prompt_ids", receipt.prompt_ids), ("ids", receipt.ids)):
        if wrong := [each for each in ids if not 0 <= each < 1 << 31]:
            raise FieldError(name, f"with the id {shown(wrong[0])}", "ids of a vocabulary")


def text_digest(text: str) -> str:
    """sha256 of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _ids_digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
