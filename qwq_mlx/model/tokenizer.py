"""The tokenizer of a model folder, from tokenizer.json alone, checked against the embedding.

transformers builds an empty tokenizer where tokenizer.json is missing, and picks a class by what the folder's
tokenizer_config.json names. Neither can happen here: the bytes of tokenizer.json go into one fixed class, and an id
beyond the model's embedding (which reads foreign memory or crashes) is refused before the model is loaded.

Does not: run code of the folder, touch the network, or render chat templates (`model.prompt` does).
"""

from __future__ import annotations

import functools
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_mlx.errors import LoadError, OptionError, system_said
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.model.upstream import import_transformers

__all__ = [
    "MAX_TEMPLATE_BYTES",
    "LoadedTokenizer",
    "check_same_tokenizer",
    "load_tokenizer",
    "read_chat_template",
    "read_text_file",
]

_MAX_TOKENIZER_BYTES = 256 << 20  # Qwen2's is 7 MB
_MAX_SETTINGS_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
_COPY = "Copy it from the model's source again."
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, kw_only=True)  # no slots: `hf` is kept where it is first made
class LoadedTokenizer:
    """A tokenizer and what prompts and decoding need to know of it.

    backend: of the tokenizers library. named: bos_token, eos_token and the like -> text.
    n_ids: 1 + the largest id it has; ids from there on are padding of the embedding.
    added: text -> id of every added token (`<|im_end|>`, `<tool_call>`): only a template may write these.
    special: the texts among them that never belong to a message (`<|im_end|>`, but not `<think>`).
    plain: the same tokenizer without any added token, for text that must stay text.
    eos_id: the id that tokenizer_config.json names as end of a turn. chat_template: jinja text, or None.
    """

    backend: Any
    named: Mapping[str, str | None]
    n_ids: int
    added: Mapping[str, int]
    special: frozenset[str]
    plain: Any
    eos_id: int | None
    chat_template: str | None

    @functools.cached_property
    def hf(self) -> Any:
        """transformers' fast tokenizer, made when first asked for.

        Importing transformers takes a second; a conversion, which only checks, does without.
        """
        return import_transformers().PreTrainedTokenizerFast(
            tokenizer_object=self.backend, clean_up_tokenization_spaces=False, **self.named
        )


def load_tokenizer(folder: Path, *, vocab_size: int) -> LoadedTokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a folder.

    vocab_size: rows of the embedding; every id must be below it.
    Raises LoadError or SourceError: file missing, damaged, empty, or of another model.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            raise LoadError(
                f"{path}: there is no such file, only vocab.json and merges.txt, which do not say how text is split. "
                "Write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        raise LoadError(
            f"{path}: there is no such file, so text cannot become ids. "
            "Copy tokenizer.json and tokenizer_config.json from the model's source into this folder."
        )
    settings_path, settings = folder / "tokenizer_config.json", _settings(folder)
    backend = _backend(path)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise LoadError(f"{path}: the vocabulary is empty. Copy tokenizer.json from the model's source again.")
    n_ids = 1 + max(vocabulary.values())
    if n_ids > vocab_size:
        raise LoadError(
            f"{path}: the largest id is {n_ids - 1:,}, the model's embedding has {vocab_size:,} rows. "
            "This is the tokenizer of another model; copy tokenizer.json from this model's source."
        )
    _check_added(settings_path, settings, vocabulary)
    added = backend.get_added_tokens_decoder()
    named = {name: _token_text(settings.get(name)) for name in _SPECIAL_NAMES}
    eos = named["eos_token"]
    if eos is not None and eos not in vocabulary:
        raise LoadError(
            f"{settings_path}: eos_token is {eos!r}, which tokenizer.json does not have. "
            "Copy both files from the model's source again."
        )
    return LoadedTokenizer(
        backend=backend,
        named={name: text for name, text in named.items() if text in vocabulary},
        n_ids=n_ids,
        added={token.content: token_id for token_id, token in added.items()},
        special=frozenset(token.content for token in added.values() if token.special),
        plain=_plain(backend),
        eos_id=None if eos is None else vocabulary[eos],
        chat_template=_chat_template(folder, settings),
    )


def check_same_tokenizer(path: Path, tokenizer: LoadedTokenizer, other_path: Path, other: LoadedTokenizer) -> None:
    """Raises OptionError where two folders' tokenizers give tokens other ids, for their models cannot be compared."""
    expected, actual = (each.backend.get_vocab(with_added_tokens=True) for each in (tokenizer, other))
    if expected != actual:
        differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
        raise OptionError(
            f"{other_path}: has another tokenizer than {path}: {len(differing):,} tokens have other ids, such as "
            f"{differing[0]!r} ({actual.get(differing[0])}, not {expected.get(differing[0])}). "
            "Give conversions and checkpoints of one and the same model."
        )


def read_text_file(path: Path, limit_bytes: int) -> str:
    """A regular file's text; a FIFO would hang and a device would never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise LoadError(f"{path}: is not a regular file. Copy it from the model's source.")
        if status.st_size > limit_bytes:
            raise LoadError(f"{path}: has {status.st_size:,} bytes, expected at most {limit_bytes:,}.")
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise LoadError(
            f"{path}: cannot be read {system_said(error, 'Check the folder and its permissions.')}"
        ) from error
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: is not UTF-8 (byte {error.start:,}). Copy it from the source again.") from error


def _backend(path: Path) -> Any:
    from tokenizers import Tokenizer

    text = read_text_file(path, _MAX_TOKENIZER_BYTES)
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception for every fault of the file
        reason = str(error)[:200]
        raise LoadError(
            f"{path}: not a tokenizer that this version of tokenizers can read ({reason}). "
            "Copy tokenizer.json from the model's source again."
        ) from error
    backend.no_truncation()  # a file may ask for both, which would shorten or lengthen prompts in silence
    backend.no_padding()
    return backend


def _plain(backend: Any) -> Any:
    """A tokenizer that shares everything but the added tokens, so text cannot become one of them."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _check_added(path: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """tokenizer_config.json repeats the added tokens; where it disagrees, one of the two files is of another model."""
    entries = settings.get("added_tokens_decoder")
    for token_id, entry in (entries if isinstance(entries, Mapping) else {}).items():
        text = _token_text(entry)
        found = vocabulary.get(text) if text is not None else None
        if found is None:
            raise LoadError(
                f"{path}: the added token {text!r} is not in tokenizer.json, which alone is read. Write both files "
                "with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        if str(found) != token_id:
            raise LoadError(
                f"{path}: the added token {text!r} has the id {token_id}, tokenizer.json says {found}. "
                "Copy both files from the model's source again."
            )


def _token_text(value: Any) -> str | None:
    """A special token stands in tokenizer_config.json as a text or as an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_chat_template(folder: Path) -> str | None:
    """The jinja text that turns messages into a prompt, as `load_tokenizer` finds it, or None. Raises as that does."""
    return _chat_template(folder, _settings(folder))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    return read_json_object(path, limit_bytes=_MAX_SETTINGS_BYTES, advice=_COPY)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; chat_template.json comes last."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text_file(file, MAX_TEMPLATE_BYTES)
    where, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        where = folder / "chat_template.json"
        template = read_json_object(where, limit_bytes=MAX_TEMPLATE_BYTES, advice=_COPY).get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise LoadError(
            f"{where}: chat_template is {type(template).__name__}, expected a text. "
            "Copy the file from the model's source again."
        )
    return template
