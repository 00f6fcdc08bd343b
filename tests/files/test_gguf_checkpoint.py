"""A GGUF as a checkpoint: names, config, tokenizer, split files, and what is refused because it is no Qwen2 model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import entry_of, gguf_bytes, metadata_of, weights_of

from qwq_mlx.errors import QwqError, SourceError
from qwq_mlx.files.checkpoint import Checkpoint, open_checkpoint
from qwq_mlx.files.gguf.checkpoint import open_gguf, opened_checkpoint
from qwq_mlx.files.gguf.header import read_gguf_header
from qwq_mlx.files.gguf.settings import model_name
from qwq_mlx.files.gguf.stores import GgufFile
from qwq_mlx.files.gguf.tokenizer import make_tokenizer, tokens_of
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.generation_config import read_generation_defaults
from qwq_mlx.model.tokenizer import LoadedTokenizer, load_tokenizer


def opened(path: Path) -> Checkpoint:
    folder = path.parent / "made"
    folder.mkdir(exist_ok=True)
    return open_gguf(GgufFile(path=path, label=path.name), folder)


def refused(path: Path, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def gguf(known_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the known checkpoint as a GGUF, its metadata changed; None drops a key."""
    tensors = {
        name: entry_of(each, "F32" if each.ndim == 1 else "BF16") for name, each in weights_of(known_checkpoint).items()
    }
    metadata, path = metadata_of(known_checkpoint), tmp_path / "model.gguf"

    def write(**changes: Any) -> Path:
        changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
        path.write_bytes(gguf_bytes(changed, tensors))
        return path

    return write


def test_names_shapes_config_and_tokenizer_are_the_checkpoints(
    known_checkpoint: Path, gguf: Callable[..., Path]
) -> None:
    expected, made = open_checkpoint(known_checkpoint), opened(gguf())
    assert {name: entry.shape for name, (_, entry) in made.tensors.items()} == {
        name: entry.shape for name, (_, entry) in expected.tensors.items()
    }
    where = "config.json"
    assert Qwen2Config.from_json(made.config, where=where) == Qwen2Config.from_json(expected.config, where=where)
    config = Qwen2Config.from_json(made.config, where=where)
    ours, theirs = (load_tokenizer(each.folder, vocab_size=config.vocab_size) for each in (made, expected))
    assert ours.backend.get_vocab() == theirs.backend.get_vocab()
    assert (ours.special, ours.added, ours.eos_id) == (theirs.special, theirs.added, theirs.eos_id)
    assert ours.chat_template == theirs.chat_template
    assert ours.n_ids < config.vocab_size  # its last rows are padding, and no text gets their ids
    defaults = read_generation_defaults(made.folder, vocab_size=config.vocab_size)
    assert defaults.eos_token_ids == read_generation_defaults(known_checkpoint, vocab_size=320).eos_token_ids
    assert made.gguf is not None
    assert (made.gguf.name, made.where.name) == ("A Small Model", "model.gguf")


def test_a_tied_model_has_no_output_matrix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = {name: each for name, each in weights_of(tiny_checkpoint).items() if name != "output.weight"}
    tensors = {name: entry_of(each, "F32" if each.ndim == 1 else "F16") for name, each in weights.items()}
    (tmp_path / "tied.gguf").write_bytes(gguf_bytes(metadata_of(tiny_checkpoint), tensors))
    made = opened(tmp_path / "tied.gguf")
    assert made.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in made.tensors


def test_yarn_and_sampling_are_taken_over(gguf: Callable[..., Path]) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 512}
    made = opened(
        gguf(
            **{f"qwen2.rope.scaling.{key}": value for key, value in scaling.items()},
            **{"general.sampling.temp": 0.6, "general.sampling.top_k": 40},
            **{"general.sampling.min_p": 0.05, "general.sampling.penalty_repeat": 1.1},
        )
    )
    yarn = Qwen2Config.from_json(made.config, where="config.json").yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_context) == (4.0, 512)
    defaults = read_generation_defaults(made.folder, vocab_size=320)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 40, None)
    assert (defaults.min_p, defaults.repetition_penalty) == (0.05, 1.1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "llama"}, "general.architecture is 'llama', expected 'qwen2'"),
    "no architecture": ({"general.architecture": None}, "general.architecture is None, expected 'qwen2'"),
    "qwen3": ({"general.architecture": "qwen3"}, "is 'qwen3', expected 'qwen2'. qwq_mlx converts and runs Qwen2"),
    "LoRA": (
        {"general.type": "adapter", "adapter.type": "lora"},
        "is a LoRA adapter, expected a whole model. Merge it",
    ),
    "LoRA without a type": ({"general.type": None, "adapter.type": "lora"}, "is a LoRA adapter"),
    "vision projector": (
        {"general.architecture": "clip"},
        r"is a vision projector \(mmproj\), expected a language model",
    ),
    "mmproj": ({"general.type": "mmproj"}, "is a vision projector"),
    "imatrix": ({"general.type": "imatrix"}, "general.type is 'imatrix', expected 'model'"),
    "embedding model": ({"qwen2.attention.causal": False}, "attention.causal is false, as of an embedding model"),
    "no context": ({"qwen2.context_length": None}, "has no qwen2.context_length"),
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
    "another split": ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected 'qwen2'"),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is not there or is no array of str"),
    "vocabulary of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is not there or is no array"),
    "fewer kinds": ({"tokenizer.ggml.token_type": [1, 1]}, "has 320 tokens and 2 kinds of tokens"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 320}, "has the token 'a' twice, expected it once"),
    "empty token": ({"tokenizer.ggml.tokens": ["", *map(str, range(319))]}, "token 0 is an empty text"),
    "token of kind 2": (
        {"tokenizer.ggml.token_type": [2] * 320},
        r"token 0 \(.*\) is of kind 2, expected 1, 3, 4 or 5",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": [str(n) for n in range(400)]},
        "has 400 tokens, but token_embd",
    ),
    "end beyond the vocabulary": ({"tokenizer.ggml.eos_token_id": 4_000}, "eos_token_id is 4000, expected an id"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_qwen2_model_is_named(gguf: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    refused(gguf(**changes), message)


def test_tensors_of_another_model_are_named(known_checkpoint: Path, tmp_path: Path) -> None:
    path, norm = tmp_path / "odd.gguf", entry_of(weights_of(known_checkpoint)["output_norm.weight"], "F32")
    for name in ("blk.0.attn_q_norm.weight", "rope_freqs.weight", "blk.00.attn_q.weight", "blk.0.attn_q.weight.lora_a"):
        path.write_bytes(gguf_bytes(metadata_of(known_checkpoint), {name: norm}))
        refused(path, f"tensor {name} is none of a Qwen2 model")
    path.write_bytes(gguf_bytes(metadata_of(known_checkpoint), {"output_norm.weight": ("I32", (128,), bytes(512))}))
    refused(path, "tensor output_norm.weight is of type I32, which no model's weights have")
    path.write_bytes(gguf_bytes(metadata_of(known_checkpoint), {"output_norm.weight": norm}))
    refused(path, "has no matrix token_embd.weight")


@pytest.fixture
def split(known_checkpoint: Path, tmp_path: Path) -> list[Path]:
    """A model in three files, the first without tensors, as gguf-split --no-tensor-first-split writes it."""
    tensors = {
        name: entry_of(each, "F32" if each.ndim == 1 else "BF16") for name, each in weights_of(known_checkpoint).items()
    }
    names = list(tensors)
    parts = [[], names[:10], names[10:]]
    paths = []
    for number, part in enumerate(parts):
        of_split = {"split.no": (2, number), "split.count": (2, 3), "split.tensors.count": (5, len(names))}
        metadata = {**(metadata_of(known_checkpoint) if number == 0 else {}), **of_split}
        paths.append(tmp_path / f"model-{number + 1:05d}-of-00003.gguf")
        paths[-1].write_bytes(gguf_bytes(metadata, {name: tensors[name] for name in part}))
    return paths


def test_a_split_file_is_one_checkpoint_whichever_part_is_named(split: list[Path], known_checkpoint: Path) -> None:
    for path in split:
        made = opened(path)
        assert made.tensors.keys() == open_checkpoint(known_checkpoint).tensors.keys()
        assert [shard.path.name[6:11] for shard in made.shards] == ["00002", "00003"]


def test_parts_that_are_missing_or_of_another_model_are_named(split: list[Path]) -> None:
    shutil.copy(split[1], split[2])
    refused(split[0], r"model-00001-of-00003.gguf: split.tensors.count is \d+, expected 20 for part 1 of 3")
    split[2].unlink()
    refused(split[0], "1 of the 3 files of the model are missing: model-00003-of-00003.gguf. Fetch them into the same")
    lone = split[1].rename(split[1].with_name("lone.gguf"))
    refused(lone, "general.architecture is None")


ODD: tuple[Any, ...] = (
    0, 1, 4, (10, 2**63), (11, -1), float("nan"), float("inf"), 1.5, 1e30, True, "", "yarn", "x" * 500, b"\xff",
    ["a", "b"], [1, 2], [1] * 320, ["a b"] * 5, "{{ bad",
)  # fmt: skip


def test_100_odd_values_in_the_metadata_end_in_our_own_errors_or_are_taken(gguf: Callable[..., Path]) -> None:
    choose, keys = random.Random(5), [*read_gguf_header(gguf()).metadata, *read_gguf_header(gguf()).array_lengths]
    keys += ["qwen2.rope.scaling.type", "qwen2.attention.key_length", "general.sampling.temp", "split.count"]
    n_refused = 0
    for _ in range(100):
        path = gguf(**{choose.choice(keys): choose.choice(ODD)})
        try:
            made = opened(path)
            config = Qwen2Config.from_json(made.config, where="config.json")
            load_tokenizer(made.folder, vocab_size=config.vocab_size)
            read_generation_defaults(made.folder, vocab_size=config.vocab_size)
        except QwqError as error:
            assert "\n" not in str(error)
            n_refused += 1
    assert 40 < n_refused < 100


def test_an_error_about_a_file_made_of_the_metadata_names_the_gguf(gguf: Callable[..., Path]) -> None:
    path = gguf(**{"tokenizer.chat_template": 5})
    with pytest.raises(QwqError) as caught, opened_checkpoint(path) as made:
        load_tokenizer(made.folder, vocab_size=320)
    assert str(caught.value).startswith(f"{path}: tokenizer_config.json"), caught.value


def qwq(**general: str) -> dict[str, str]:
    return {f"general.{key}": value for key, value in general.items()}


@pytest.mark.parametrize(
    ("metadata", "tokens", "name"),
    [
        (qwq(name="QwQ 32B Preview", basename="QwQ", finetune="Preview"), ["<|im_end|>"], "QwQ-32B-Preview"),
        (qwq(name="QwQ 32B"), ["<|im_end|>", "<think>", "</think>"], "QwQ-32B"),
        (qwq(name="qwq-32b-preview-abliterated"), ["<think>"], "QwQ-32B"),  # the vocabulary decides
        (qwq(name="Qwen2.5 32B Instruct"), ["<|im_end|>"], "Qwen2.5 32B Instruct"),
        ({}, [], "a Qwen2 model without a name"),
        (
            qwq(name="\x1b]0;title\x07\nmy model" + 200 * "!"),
            [],
            "]0;title  my model" + 61 * "!",
        ),  # shown in a terminal
    ],
)
def test_the_two_models_called_qwq_are_told_apart(metadata: dict[str, str], tokens: list[str], name: str) -> None:
    shape = {"hidden_size": 5120, "num_hidden_layers": 64, "vocab_size": 152_064}
    assert model_name(metadata, tokens, shape) == name
    if name.startswith("QwQ"):
        assert model_name(metadata, tokens, {**shape, "hidden_size": 896}) == metadata["general.name"]


@pytest.fixture(scope="module")
def rebuilt(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """QwQ-32B-Preview's tokenizer out of a GGUF's metadata."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("qwq")
    for path in (shared / "qwq/config.json", *(shared / "qwq/tokenizer").glob("tokenizer*.json")):
        (folder / path.name).symlink_to(path)
    metadata = metadata_of(folder)
    assert len(tokens_of(metadata, folder)) == 152_064
    return Tokenizer.from_str(json.dumps(make_tokenizer(metadata, folder)))


def test_the_real_vocabulary_and_added_tokens_are_rebuilt(rebuilt: Any, shared: Path) -> None:
    theirs = json.loads((shared / "qwq/tokenizer/tokenizer.json").read_text())
    ours = json.loads(rebuilt.to_str())
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert rebuilt.get_vocab_size() == 151_665


def test_46_vectors_and_10_000_random_texts_have_the_real_tokenizers_ids(
    rebuilt: Any, shared: Path, real_tokenizer: LoadedTokenizer
) -> None:
    folder = shared / "qwq/tokenizer"
    texts = (folder / "vectors.inp").read_text().split("\n__ggml_vocab_test__\n")[:-1]
    vectors = [list(map(int, line.split())) for line in (folder / "vectors.out").read_text().split("\n")[: len(texts)]]
    assert len(texts) == 46
    assert [each.ids for each in rebuilt.encode_batch(texts, add_special_tokens=False)] == vectors
    choose = random.Random(19)
    pieces = [
        "<|im_end|>",
        "<|im_start|>",
        "<tool_call>",
        "[PAD151665]",
        " ",
        "\n",
        "\t",
        "'s",
        "é",
        "e\u0301",
        "ﬁ",
        "中文",
        "१२",
    ]
    pieces += ["Wait", " the", "1", "42", "\\boxed{", "}", "🙂", "\u200b", "\ufeff", "ⅷ", "don't", "...", "—"]
    random_texts = [
        "".join(
            choose.choice(pieces)
            if choose.random() < 0.7
            else chr(choose.choice((0x20, 0x3B0, 0x4E00, 0x1F600)) + choose.randrange(90))
            for _ in range(choose.randint(1, 12))
        )
        for _ in range(10_000)
    ]
    theirs = real_tokenizer.backend.encode_batch(random_texts, add_special_tokens=False)
    ours = rebuilt.encode_batch(random_texts, add_special_tokens=False)
    assert [each.ids for each in ours] == [each.ids for each in theirs]
