"""A calibration text: read, encoded by the checkpoint's own tokenizer, checked, and cut into parts that fit.

Does not: run it (`fit_layers` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.convert.calibration import BUNDLED
from qwq_mlx.errors import OptionError, PromptError, SourceError
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer
from qwq_mlx.quant.error_feedback import MAX_CHANNELS, block_size
from qwq_mlx.quant.float_targets import MIN_IDS_TOWARD_FLOAT

__all__ = ["DEVICE_WEIGHTS", "FIT_ROWS", "MIN_IDS", "Calibration", "read_calibration"]

FIT_ROWS = 1024
"""Rows of a matrix that are fitted at a time. Part of a result, as far as BLAS adds by it."""

DEVICE_WEIGHTS = 1 << 26
"""Weights that a GPU fits at a time, in whole rows: about nine times their 0.27 GB are in memory."""

MIN_IDS = 512
"""The fewest ids that a text must have: below, chance decides what looks important."""

_MAX_IDS = 65_536  # of a longer text the first ones are used: their hidden states stay in memory, 1.3 GB for the 32B
_MAX_IDS_OF_CPU = 16_384  # which takes hours for more
_CHUNK = 512  # ids that attend to each other
_MAX_BYTES = 64 << 20
_BUNDLED_FILE = Path(__file__).with_name("qwq.jsonl")
_HOW = (
    'Give a UTF-8 text, or a .jsonl file: what `generate --input` wrote, or {"text": ...}, {"messages": [...]} or '
    '{"prompt": ..., "response": ...} on every line.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A checked text. name, sha256: of its file. texts: ids, each run by itself."""

    name: str
    sha256: str
    texts: tuple[tuple[int, ...], ...]

    @property
    def n_ids(self) -> int:
        """Ids of all texts."""
        return sum(map(len, self.texts))

    @property
    def is_toward_float(self) -> bool:
        """Whether the text is run through the float model too, and says what packed layers should give."""
        return self.n_ids >= MIN_IDS_TOWARD_FLOAT

    def as_mapping(self) -> dict[str, Any]:
        """What the journal and the manifest keep."""
        return {"file": self.name, "sha256": self.sha256, "n_texts": len(self.texts), "n_ids": self.n_ids}

    def peak_memory_bytes(self, config: Qwen2Config, *, n_workers: int) -> int:
        """One layer in float32, with the float model as it was and as it is packed, its widest matrix as it is read,
        the hidden states, the products of one part's inputs, and either what one text needs on its way or, while
        matrices are fitted, one block's factors and the rows at work; an estimate.
        """
        width, inner = config.hidden_size, config.intermediate_size
        layer = 2 * width * (width + config.num_key_value_heads * config.head_dim) + 3 * width * inner
        text = _CHUNK * (6 * inner + 12 * width + 2 * config.num_attention_heads * _CHUNK)
        # Moments and drifts as they are added up, or with factors in their place; of the residual stream's, two.
        products = (2 + self.is_toward_float) * max(width * block_size(width), inner * block_size(inner))
        streams = (1 + self.is_toward_float) * (layer + self.n_ids * width)
        products += self.is_toward_float * 2 * width * inner
        at_work = 7 * n_workers * FIT_ROWS * inner
        if backend_name() != "cpu":
            fitted_at_once = min(DEVICE_WEIGHTS, config.vocab_size * width)
            at_work = 9 * fitted_at_once + config.vocab_size * width // 4  # and the output matrix, packed, twice
        factors = 12 * min(max(width, inner), MAX_CHANNELS) ** 2 + at_work
        return 4 * (streams + width * inner + products + max(text, factors))


def read_calibration(path: str | Path, checkpoint: Checkpoint, config: Qwen2Config) -> Calibration:
    """Read a text and encode it with the checkpoint's own tokenizer.

    path: plain text, or where the name ends in .jsonl an object a line: {"text": ...}; {"messages": [...]}, or "prompt"
    and "response" and perhaps "system", which the checkpoint's template renders; or results of `generate --input`, by
    their ids. Or BUNDLED. Raises OptionError: not readable, not UTF-8, a wrong line, another vocabulary, too short.
    """
    path = _BUNDLED_FILE if path == BUNDLED else Path(path)
    data = _read(path)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 (byte {error.start:,}). {_HOW}") from error
    tokenizer = load_tokenizer(checkpoint.folder, vocab_size=config.vocab_size)
    texts: list[tuple[int, ...]] = []
    n_ids, most = 0, _MAX_IDS_OF_CPU if backend_name() == "cpu" else _MAX_IDS
    for ids in _texts(path, text, tokenizer):
        for start in range(0, len(ids), _CHUNK):
            texts.append(tuple(ids[start : start + min(_CHUNK, most - n_ids)]))
            n_ids += len(texts[-1])
            if n_ids == most:
                break
        if n_ids == most:
            break
    if n_ids < MIN_IDS:
        raise OptionError(
            f"{path}: has {n_ids:,} tokens, expected at least {MIN_IDS:,} to calibrate with ({most:,} are used at "
            "most). Give more text of the kind that the model will write."
        )
    return Calibration(name=path.name, sha256=hashlib.sha256(data).hexdigest(), texts=tuple(texts))


def _read(path: Path) -> bytes:
    try:
        return read_regular_file(path, limit_bytes=_MAX_BYTES, expected="a calibration text", advice=_HOW)
    except SourceError as error:
        raise OptionError(str(error)) from error


def _texts(path: Path, text: str, tokenizer: LoadedTokenizer) -> Iterator[list[int]]:
    if path.suffix != ".jsonl":
        yield encode_text(tokenizer, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json_object(line.encode(), what=f"{path}, line {number}:", advice=_HOW)
        except SourceError as error:
            raise OptionError(str(error)) from error
        try:
            ids = _line_ids(value, tokenizer, f"{path}, line {number}")
        except PromptError as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
        except SourceError as error:  # it says where
            raise OptionError(str(error)) from error
        if ids is None:
            raise OptionError(f"{path}, line {number}: is {line[:40]!r}, which has no text and no messages. {_HOW}")
        yield ids


def _line_ids(value: dict[str, Any], tokenizer: LoadedTokenizer, where: str) -> list[int] | None:
    """None for a line of no kind that there is."""
    if isinstance(value.get("text"), str):
        return encode_text(tokenizer, value["text"])
    if isinstance(value.get("messages"), list):
        return _conversation(tokenizer, value["messages"])
    if "index" in value and "run" in value:
        return _trace_ids(value, tokenizer, where) if "trace" in value else []  # a question that failed
    prompt, response, system = value.get("prompt"), value.get("response"), value.get("system")
    if not isinstance(prompt, str) or not isinstance(response, str) or not isinstance(system, str | None):
        return None
    return prompt_ids(tokenizer, prompt, system_prompt=system, context=1 << 31) + encode_text(tokenizer, response)


def _trace_ids(value: dict[str, Any], tokenizer: LoadedTokenizer, where: str) -> list[int]:
    """Of a result: its prompt and what was written. Raises OptionError where they are another text to the tokenizer."""
    from qwq_mlx.engine.detokenizer import Pieces, first_other
    from qwq_mlx.trace.trace import Trace

    fields, measured = value["trace"], value.get("measured", {})
    are_objects = isinstance(fields, dict) and isinstance(measured, dict)
    trace, pieces = Trace.from_json({**fields, **measured} if are_objects else None, where=where), Pieces(tokenizer)
    ids = [*trace.prompt_ids, *trace.ids]
    are_known = all(0 <= each < pieces.n_ids for each in ids)
    if not are_known or first_other(pieces, trace.ids, trace.texts) is not None:
        raise OptionError(
            f"{where}: was written with another vocabulary than the checkpoint's. Calibrate by what a model of the "
            "same tokenizer wrote."
        )
    return ids


def _conversation(tokenizer: LoadedTokenizer, messages: list[Any]) -> list[int]:
    """The prompt as the template writes it, and what the assistant said to it."""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return prompt_ids(tokenizer, messages[:-1], context=1 << 31) + encode_text(tokenizer, last["content"])
    return prompt_ids(tokenizer, messages, context=1 << 31)
