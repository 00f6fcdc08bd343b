"""Trained weights become a checkpoint in QwQ-32B-Preview's layout: two shards, an index, config and sampling defaults.

Does not: write the tokenizer (vocabulary.py does).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from pocket.model import CONFIG
from pocket.vocabulary import END_OF_TEXT, IM_END

__all__ = ["export"]

N_SHARDS = 2


def export(weights: Path, folder: Path) -> None:
    """Write the bfloat16 `weights` (a state dict by torch.save) and everything that describes them into `folder`."""
    state: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_of_text, im_end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END))
    _write_shards(state, folder)
    _write_json(folder / "config.json", {**CONFIG, "bos_token_id": end_of_text, "eos_token_id": im_end})
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "do_sample": True,
            "eos_token_id": [im_end, end_of_text],
            "repetition_penalty": 1.0,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
    )


def _write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    total = sum(tensor.nbytes for tensor in state.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(N_SHARDS)]
    written = 0
    for name, tensor in state.items():
        shards[min(N_SHARDS - 1, written * N_SHARDS // total)][name] = tensor.contiguous()
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{N_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file leaves files that only their owner can read
        weight_map |= dict.fromkeys(shard, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
