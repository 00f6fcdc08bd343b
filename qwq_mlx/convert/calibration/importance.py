"""A text whose activations say which input channels of a matrix matter: read and checked, then run once, by layers.

The importance of an input channel is the mean of its squared values over the text, over the mean of all channels of the
matrix, and 0.01 so that a channel that was silent keeps some. The text passes the source's own weights one layer at a
time (`model.layers`), so it costs the memory of one layer and of the hidden states, whatever the model's depth. What
was found lies in the partial folder, whole and durable, before the first tensor is packed: a resumed run reads it. It
stays in the conversion as calibration.data (a safetensors file by another name, so that no loader takes it for
weights; 15 MB for the 32B): with it tensors can be packed again and compared (`qwq_mlx.verify`).

The embedding is not weighted (its input is an id), unless it is tied to the output matrix. Figures are those of the
device that ran them: another device, or another MLX, may differ in the last digits and so in some codes.

Does not: pack anything, or fetch (`collect` does, for a source of the Hub).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.calibration.pass_state import (
    PassState,
    PassStateWriter,
    arrays_of,
    header_of,
    pass_state_path,
    read_pass_state,
    text_of,
)
from qwq_mlx.errors import ConversionError, OptionError, PromptError, SourceError
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.checkpoint import Checkpoint
from qwq_mlx.files.header import TensorEntry, place_tensors
from qwq_mlx.files.json_object import parse_json_object
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.folder import ModelFolder
from qwq_mlx.model.layers import LayerStream
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.prompt import encode_text, prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer
from qwq_mlx.model.upstream import import_mlx

__all__ = [
    "MIN_IDS",
    "STATISTICS_NAME",
    "Calibration",
    "Importance",
    "importance_of",
    "read_calibration",
    "read_importance",
    "saved_pass",
    "statistics_bytes",
]

Importance = Mapping[str, NDArray[np.float32]]
"""Path of a matrix (without ".weight") -> (in,), the importance of each input channel, positive, about 1 on average."""

MIN_IDS = 512
"""The fewest ids that a text must have: below, chance decides what looks important."""

STATISTICS_NAME = "calibration.data"
"""The file of a calibrated conversion that holds the importance of every channel."""

_MAX_IDS = 16_384  # of a longer text the first ones are used: their hidden states stay in memory, 0.34 GB for the 32B
_CHUNK = 512  # ids that attend to each other
_MAX_BYTES = 64 << 20
_FLOOR = np.float32(0.01)
_HOW = 'Give a UTF-8 text, or a .jsonl file with {"text": ...} or {"messages": [...]} on every line.'


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

    def as_mapping(self) -> dict[str, Any]:
        """What the journal and the manifest keep."""
        return {"file": self.name, "sha256": self.sha256, "n_texts": len(self.texts), "n_ids": self.n_ids}

    def peak_memory_bytes(self, config: Qwen2Config) -> int:
        """One layer in float32, two copies of its widest matrix as it is read, the hidden states, and what one text
        needs on its way; an estimate.
        """
        width, inner = config.hidden_size, config.intermediate_size
        layer = 2 * width * (width + config.num_key_value_heads * config.head_dim) + 3 * width * inner
        text = _CHUNK * (3 * inner + 9 * width + 2 * config.num_attention_heads * _CHUNK)
        return 4 * (layer + width * inner + self.n_ids * width + text)


def read_calibration(path: str | Path, checkpoint: Checkpoint, config: Qwen2Config) -> Calibration:
    """Read a text and encode it with the checkpoint's own tokenizer.

    Plain text, or where the name ends in .jsonl an object a line: {"text": ...}, or {"messages": [...]}, which the
    checkpoint's template renders. Raises OptionError: not readable, not UTF-8, a wrong line, or too short.
    """
    path = Path(path)
    data = _read(path)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 (byte {error.start:,}). {_HOW}") from error
    tokenizer = load_tokenizer(checkpoint.folder, vocab_size=config.vocab_size)
    texts: list[tuple[int, ...]] = []
    n_ids = 0
    for ids in _texts(path, text, tokenizer):
        for start in range(0, len(ids), _CHUNK):
            texts.append(tuple(ids[start : start + min(_CHUNK, _MAX_IDS - n_ids)]))
            n_ids += len(texts[-1])
            if n_ids == _MAX_IDS:
                break
        if n_ids == _MAX_IDS:
            break
    if n_ids < MIN_IDS:
        raise OptionError(
            f"{path}: has {n_ids:,} tokens, expected at least {MIN_IDS:,} to calibrate with (16,384 are used at most). "
            "Give more text of the kind that the model will write."
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
        if isinstance(value.get("text"), str):
            yield encode_text(tokenizer, value["text"])
        elif isinstance(value.get("messages"), list):
            try:
                yield _conversation(tokenizer, value["messages"])
            except PromptError as error:
                raise OptionError(f"{path}, line {number}: {error}") from error
        else:
            raise OptionError(f"{path}, line {number}: is {line[:40]!r}, which has no text and no messages. {_HOW}")


def _conversation(tokenizer: LoadedTokenizer, messages: list[Any]) -> list[int]:
    """The prompt as the template writes it, and what the assistant said to it."""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return prompt_ids(tokenizer, messages[:-1], context=1 << 31) + encode_text(tokenizer, last["content"])
    return prompt_ids(tokenizer, messages, context=1 << 31)


def importance_of(
    calibration: Calibration,
    checkpoint: Checkpoint,
    path: Path,
    progress: Callable[[str], None],
    *,
    before: Callable[[str], None] = lambda part: None,
    state: PassState | None = None,
) -> Importance:
    """The importance of every input channel: from the file if it is of this text, else by a run.

    Afterwards the file holds it. progress: called with the name of each layer. before: called by a run, see
    `LayerStream.run`; from then on the tensors that it names have to be there. state: what `saved_pass` found, for a
    run to go on from. A run that is stopped leaves such a file beside `path`. Raises SourceError; ConversionError for
    activations that are not finite; OSError where a file cannot be written.
    """
    importance = read_importance(path, calibration.as_mapping())
    if importance is None:
        keeper = PassStateWriter(pass_state_path(path), _run_mapping(calibration))
        importance = _run(calibration, checkpoint, progress, before, keeper, state)
        head, entries = _layout(calibration, {name: len(values) for name, values in importance.items()})
        write_file(path, head + b"".join(importance[entry.name].astype("<f4").tobytes() for entry in entries))
    pass_state_path(path).unlink(missing_ok=True)
    return importance


def saved_pass(calibration: Calibration, path: Path) -> PassState | None:
    """How far an earlier run of `importance_of` came with this text on this device; None where nothing is kept."""
    return read_pass_state(pass_state_path(path), _run_mapping(calibration))


def _run_mapping(calibration: Calibration) -> dict[str, Any]:
    """What the bits of a run follow from, beside the checkpoint."""
    mx = import_mlx()
    device = str(mx.default_device())
    return {**calibration.as_mapping(), "type": default_compute_type(), "device": device, "mlx": mx.__version__}


def statistics_bytes(calibration: Calibration, checkpoint: Checkpoint, config: Qwen2Config) -> int:
    """Size of the file that holds the importance of a checkpoint's channels."""
    unseen = set() if config.tie_word_embeddings else {"model.embed_tokens"}
    columns = {
        name.removesuffix(".weight"): entry.shape[1]
        for name, (_, entry) in checkpoint.tensors.items()
        if len(entry.shape) == 2 and name.removesuffix(".weight") not in unseen
    }
    return _layout(calibration, columns)[1][-1].end


def _layout(calibration: Calibration, columns: Mapping[str, int]) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """columns: path of a matrix -> its input channels."""
    metadata = {"calibration": text_of(calibration.as_mapping())}
    return place_tensors([(name, "F32", (columns[name],)) for name in sorted(columns)], metadata)


def read_importance(path: Path, calibration: Mapping[str, Any]) -> Importance | None:
    """The importance in a file; None where there is none, or it is not whole, or of another text.

    calibration: the text, as `Calibration.as_mapping` says it.
    """
    header = header_of(path, "calibration", calibration)
    return None if header is None else arrays_of(header)


def _run(
    calibration: Calibration,
    checkpoint: Checkpoint,
    progress: Callable[[str], None],
    before: Callable[[str], None],
    keeper: PassStateWriter,
    state: PassState | None,
) -> Importance:
    mx = import_mlx()
    sums: dict[str, NDArray[np.float64]] = {} if state is None else dict(state.sums)

    def observe(paths: tuple[str, ...], x: Any) -> None:
        squares = mx.sum(mx.square(x.astype(mx.float32)), axis=0)
        mx.eval(squares)
        if paths[0] not in sums:
            progress(paths[0])
        for path in paths:
            sums[path] = sums.get(path, np.float64(0)) + np.array(squares).astype(np.float64)

    def keep(n_layers: int, hidden: list[Any]) -> None:
        if keeper.is_due():
            floats = [np.array(each.astype(mx.float32)) for each in hidden]
            keeper.keep(PassState(n_layers=n_layers, hidden=floats, sums=sums))

    folder = checkpoint.shards[0].path.parent
    config = Qwen2Config.from_json(checkpoint.config, where=str(folder))
    files = ModelFolder(path=folder, checkpoint=checkpoint, config=config, packed={})
    stream = LayerStream(files)
    start = None
    if state is not None:
        compute_type = getattr(mx, stream.compute_type)
        start = state.n_layers, [mx.array(each).astype(compute_type) for each in state.hidden]
    stream.run(calibration.texts, observe, before=before, after=keep, begun=start)
    wrong = sorted(path for path, values in sums.items() if not np.isfinite(values).all())
    if wrong:
        raise ConversionError(
            f"{checkpoint.folder}: the calibration text made activations that are NaN or infinite before "
            f"{', '.join(wrong[:5])}. The checkpoint is damaged, or the text is not of its kind; convert without it."
        )
    tiny = np.finfo(np.float64).tiny
    return {
        path: (values / max(values.mean(), tiny)).astype(np.float32) + _FLOOR for path, values in sorted(sums.items())
    }
