"""generation_config.json: what it says is taken, what cannot be is refused, nothing is swallowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import LoadError, SourceError
from qwq_mlx.model.generation_config import GenerationDefaults, read_generation_defaults


def read(folder: Path, **values: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation_defaults(folder, vocab_size=320)


def test_a_folder_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path, vocab_size=320) == GenerationDefaults()


def test_the_values_of_qwq_preview_are_read(tiny_checkpoint: Path) -> None:
    values = read_generation_defaults(tiny_checkpoint, vocab_size=320)
    assert (values.temperature, values.top_p, values.top_k, values.min_p) == (0.7, 0.8, 20, None)
    written = json.loads((tiny_checkpoint / "generation_config.json").read_text())
    assert values.eos_token_ids == tuple(written["eos_token_id"])


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False, temperature=0.7).temperature == 0.0
    assert read(tmp_path, do_sample=True, temperature=0.7).temperature == 0.7


def test_one_end_id_and_several_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (7,)
    assert read(tmp_path, eos_token_id=[7, 9]).eos_token_ids == (7, 9)


def test_a_top_k_of_minus_one_means_no_limit(tmp_path: Path) -> None:
    assert read(tmp_path, top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("do_sample", "yes", "true or false"),
        ("temperature", -1, "a number from 0 to 100"),
        ("temperature", "0.7", "a number from 0 to 100"),
        ("top_p", 2, "a number from 1e-09 to 1"),
        ("top_p", 0, "a number from 1e-09 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", True, "a number from 1e-09 to 100"),
        ("top_k", 2.5, "a whole number of at least 0, or -1 for no limit"),
        ("top_k", -2, "a whole number of at least 0, or -1 for no limit"),
        ("eos_token_id", 320, "ids from 0 to 319"),
        ("eos_token_id", [-1], "ids from 0 to 319"),
        ("eos_token_id", "<|im_end|>", "ids from 0 to 319"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str, value: Any, expected: str) -> None:
    with pytest.raises(LoadError, match=rf"generation_config\.json: {name} is .*, expected {expected}\. Copy"):
        read(tmp_path, **{name: value})


@pytest.mark.parametrize("text", ['{"eos_token_id": [7', '{"temperature": NaN}', "[]"])
def test_a_damaged_file_is_refused_not_swallowed(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(
        SourceError, match=r"generation_config\.json: (is not JSON|holds a JSON list).* Copy generation"
    ):
        read_generation_defaults(tmp_path, vocab_size=320)
