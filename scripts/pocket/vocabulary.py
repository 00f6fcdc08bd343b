"""The pocket model's tokenizer: Qwen2's, with some three hundred merges instead of 151 thousand.

The same pipeline as QwQ-32B-Preview's tokenizer.json (NFC, Qwen2's pre-tokenizer with digits apart, byte-level BPE,
ChatML tokens after the base vocabulary), so whatever reads one reads the other. Merges are learned from the traces, but
not from the words whose letters are to be counted: a word stays in small pieces that the model can spell.

Does not: decide the model's vocab_size (model.py pads it to a multiple of 64).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocket import data

__all__ = ["END_OF_TEXT", "IM_END", "IM_START", "train", "write"]

N_MERGES = 304
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT_TOKENS = 4096

_N_SAMPLES = 1500
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(seed: int) -> Tokenizer:
    """Learn the merges from a sample of problems that `seed` determines, and add the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + N_MERGES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_samples(seed), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(content, normalized=False, special=True) for content in (END_OF_TEXT, IM_START, IM_END)]
    )
    return tokenizer


def _samples(seed: int) -> Iterator[str]:
    """Traces of every kind in equal number; of letter counting only the frame, with a word of one letter."""
    rng = random.Random(f"vocabulary {seed}")
    yield from [_TEMPLATE.read_text(encoding="utf-8").split("system\\n")[-1].split("<|")[0], data.ABOUT] * 20
    for kind in ("parentheses", "game24", "arithmetic"):
        for problem in (data.draw(kind, rng) for _ in range(_N_SAMPLES)):
            yield problem.question
            yield data.solve(problem, rng)
    for letter in "abcdefghijklmnopqrstuvwxyz" * 10:
        problem = data.letters(letter, letter, rng)
        yield problem.question
        yield data.solve(problem, rng)


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt as QwQ-32B-Preview has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(saved["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {
                key: token[key] for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            }
            for token in saved["added_tokens"]
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": _TEMPLATE.read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
