"""The tokenizer of a Qwen2 GGUF as the tokenizer.json and tokenizer_config.json of the Hub.

A GGUF has the vocabulary, the merges and the kind of every token, and names the rule that cuts text into words. Rows of
the embedding that pad it are entered as tokens [PAD151665] ...; they are left out here, so that no text gets their ids.

Does not: encode anything, or accept a tokenizer of another family.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwq_mlx.errors import SourceError
from qwq_mlx.files.gguf.scan import Value

__all__ = ["ARRAYS", "make_tokenizer", "make_tokenizer_config", "tokens_of"]

_TOKENS, _MERGES, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
ARRAYS = (_TOKENS, _MERGES, _KINDS)
"""Keys of the arrays that a tokenizer is made of."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PADDING = re.compile(r"\[PAD(\d+)\]")
# llama.cpp's converter takes every added token that looks like <|this|> for a special one; in Qwen2.5's own
# tokenizer.json these are not.
_NOT_SPECIAL = {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_AGAIN = "Fetch the file again, or give the model's safetensors."


def tokens_of(metadata: Mapping[str, Value], path: Path) -> list[str]:
    """The texts of all ids, padding included. Raises SourceError for a tokenizer that is not Qwen2's."""
    for key, expected in (("model", "gpt2"), ("pre", "qwen2")):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value != expected:
            raise SourceError(
                f"{path}: tokenizer.ggml.{key} is {value!r:.60}, expected {expected!r}, Qwen2's. Give the model's "
                "safetensors, whose tokenizer.json says how text is split."
            )
    return _list(metadata, _TOKENS, str, path)


def make_tokenizer(metadata: Mapping[str, Value], path: Path) -> dict[str, Any]:
    """tokenizer.json. Raises SourceError for arrays that do not fit each other."""
    tokens, kinds = tokens_of(metadata, path), _list(metadata, _KINDS, int, path)
    if len(kinds) != len(tokens):
        raise SourceError(f"{path}: has {len(tokens):,} tokens and {len(kinds):,} kinds of tokens. {_AGAIN}")
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise SourceError(f"{path}: has the token {twice!r} twice, expected it once. {_AGAIN}")
    if "" in tokens:
        raise SourceError(f"{path}: token {tokens.index(''):,} is an empty text, expected at least one byte. {_AGAIN}")
    vocabulary, added = {}, []
    for token_id, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _UNUSED or ((match := _PADDING.fullmatch(text)) and int(match[1]) == token_id):
            continue
        if kind == _NORMAL:
            vocabulary[text] = token_id
        elif kind in (_CONTROL, _USER_DEFINED):
            added.append(_added(token_id, text, is_special=kind == _CONTROL and text not in _NOT_SPECIAL))
        else:
            raise SourceError(f"{path}: token {token_id:,} ({text!r:.60}) is of kind {kind}, expected 1, 3, 4 or 5.")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                _BYTE_LEVEL,
            ],
        },
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": _list(metadata, _MERGES, str, path),
        },
    }


def make_tokenizer_config(
    metadata: Mapping[str, Value], tokenizer: Mapping[str, Any], tokens: Sequence[str], path: Path
) -> dict[str, Any]:
    """tokenizer_config.json, with the file's chat template where it has one. Raises SourceError."""

    def text_of(key: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            raise SourceError(f"{path}: tokenizer.ggml.{key}_token_id is {token_id!r:.40}, expected an id. {_AGAIN}")
        return tokens[token_id]

    config: dict[str, Any] = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(each["id"]): {key: value for key, value in each.items() if key != "id"}
            for each in tokenizer["added_tokens"]
        },
        "bos_token": None,  # as Qwen2's own: no text begins with one
        "clean_up_tokenization_spaces": False,
        "eos_token": text_of("eos"),
        "model_max_length": metadata.get("qwen2.context_length"),
        "pad_token": text_of("padding"),
        "tokenizer_class": "Qwen2Tokenizer",
    }
    template = metadata.get("tokenizer.chat_template")
    return config | ({} if template is None else {"chat_template": template})


def _added(token_id: int, text: str, *, is_special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **plain, "special": is_special}


def _list(metadata: Mapping[str, Value], key: str, kind: type, path: Path) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(each) is kind for each in value):
        raise SourceError(f"{path}: {key} is not there or is no array of {kind.__name__}. {_AGAIN}")
    return value
