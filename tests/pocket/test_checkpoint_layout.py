"""The bundled checkpoint is laid out as QwQ-32B-Preview's."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from pocket import data, packing
from tokenizers import Tokenizer

from qwq_mlx.facts import POCKET, QWQ_32B_PREVIEW
from qwq_mlx.files.header import read_header
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.pocket import FOLDER

pytestmark = pytest.mark.pocket


def _config() -> dict[str, object]:
    config: dict[str, object] = json.loads((FOLDER / "config.json").read_text())
    return config


def test_it_is_a_small_qwen2_with_grouped_queries_and_widths_of_64() -> None:
    config = _config()
    headers = [read_header(path) for path in sorted(FOLDER.glob("*.safetensors"))]
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    n_weights = sum(math.prod(entry.shape) for entry in tensors.values())
    assert len(headers) == 2 and {entry.dtype for entry in tensors.values()} == {"BF16"}
    assert n_weights <= 12_000_000
    assert sum((FOLDER / each).stat().st_size for each in {header.path.name for header in headers}) <= 24_000_000
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[name] % 64 == 0  # type: ignore[operator]
        assert config[name] == getattr(POCKET, name)
    assert config["num_key_value_heads"] < config["num_attention_heads"]  # type: ignore[operator]
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)


def test_its_files_and_keys_are_those_of_qwq_32b_preview(shared: Path) -> None:
    real = json.loads((shared / "qwq" / "config.json").read_text())
    assert set(_config()) == set(real)
    generation = json.loads((shared / "qwq" / "generation_config.json").read_text())
    own = json.loads((FOLDER / "generation_config.json").read_text())
    assert set(own) == set(generation)
    for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty"):
        assert own[name] == generation[name]


def test_its_template_is_the_official_one_with_its_default_system_prompt(shared: Path) -> None:
    own = json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
    official = (shared / "qwq" / "chat_template.jinja").read_text()
    assert own.strip() == official.strip()
    assert str(QWQ_32B_PREVIEW.system_prompt) in own and "<think>" not in own


def test_digits_stand_apart_and_every_text_comes_back() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert len(tokenizer.encode("479").ids) == 3
    for text in ("1 + 2 * 3 = 479", "déjà vu 漢字 🙂", "  two  spaces\n\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_reads_the_prompt_that_generation_writes() -> None:
    """The trained ids up to the assistant's turn are the chat template's, so the model sees what it learned on."""
    assert POCKET.system_prompt is not None
    encoder = packing.Encoder(FOLDER, POCKET.system_prompt)
    tokenizer = load_tokenizer(FOLDER, vocab_size=POCKET.vocab_size)
    for problem in data.held_out_problems("letters", 5, seed=9):
        assert encoder.prompt(problem.question) == prompt_ids(tokenizer, problem.question, context=4096)
