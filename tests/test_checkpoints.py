"""The tiny checkpoint is what the reference libraries take it for."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CHAT_TEMPLATE, encode_floats, write_tiny_checkpoint

from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_its_tensors_are_those_of_its_config(tmp_path: Path, tie: bool, n_shards: int) -> None:
    from safetensors import safe_open

    folder = write_tiny_checkpoint(tmp_path / "c", tie=tie, n_shards=n_shards)
    config = Qwen2Config.from_json(json.loads((folder / "config.json").read_text()), where="config.json")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                view = shard.get_slice(name)
                assert view.get_dtype() == "BF16"
                assert index[name] == path.name
                found[name] = tuple(view.get_shape())
    check_tensors(tensor_shapes(config), found, where=str(folder))
    assert len(set(index.values())) == n_shards


def test_it_is_the_same_bytes_every_time(tmp_path: Path, tiny_checkpoint: Path) -> None:
    again = write_tiny_checkpoint(tmp_path / "again")
    names = [path.name for path in again.iterdir()]
    assert filecmp.cmpfiles(tiny_checkpoint, again, names, shallow=False)[0] == names
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    shard = "model-00001-of-00002.safetensors"
    assert (other / shard).read_bytes() != (again / shard).read_bytes()


def test_bfloat16_rounds_to_nearest_even() -> None:
    halfway_down, halfway_up = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    bits = np.frombuffer(encode_floats(np.array([1.0, halfway_down, halfway_up, -0.0]), "BF16"), "<u2")
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x8000]


def test_its_tokenizer_splits_digits_and_keeps_chatml_whole(tiny_checkpoint: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_checkpoint / "tokenizer.json"))
    text = "Wait, 479 is so: «π»\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 479 the")) == ["Ġ", "4", "7", "9", "Ġthe"]
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.startswith("<|im_start|>system\nYou are a tiny test model.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert prompt.endswith("<|im_start|>assistant\n")
