"""Qwen2 as numbers: every wrong config is refused by field, every wrong tensor by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.errors import LoadError
from qwq_mlx.facts import MODELS, QWQ_32B_PREVIEW
from qwq_mlx.model.architecture import Qwen2Config, check_tensors, tensor_shapes

GOOD: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 300,
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def parse(**changes: Any) -> Qwen2Config:
    return Qwen2Config.from_json({**GOOD, **changes}, where="m/config.json")


def test_a_good_config_keeps_its_values() -> None:
    config = parse()
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (96, 16, 301)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 1e6, False)
    assert config.eos_token_ids == (300,)
    assert parse(eos_token_id=[299, 300]).eos_token_ids == (299, 300)
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse(head_dim=16) == config


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [None, 0, -1, 2**31, 1.0, math.nan, True, "96", [96]])
def test_a_size_that_cannot_be_is_refused_by_its_field(name: str, value: Any) -> None:
    with pytest.raises(LoadError, match=rf"m/config\.json: {name} is .*, expected a whole number from 1 to"):
        parse(**{name: value})


@pytest.mark.parametrize("name", [*SIZES, "rms_norm_eps", "rope_theta"])
def test_a_missing_number_is_refused_by_its_field(name: str) -> None:
    config = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(LoadError, match=f"{name} is missing"):
        Qwen2Config.from_json(config, where="m/config.json")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
        ({"model_type": None}, "model_type is None, expected 'qwen2'"),
        ({"hidden_size": 97}, "hidden_size 97 is not a multiple of num_attention_heads 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": 90}, "head width 15 is odd"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_scaling is .*dynamic.*, expected type 'default'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is None, expected a number from 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 2}}, "rope_scaling: mscale is 2, which mlx_lm's"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1024, "original_max_position_embeddings": 10**6}},
            "original_max_position_embeddings is .*, expected a whole",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is true, expected false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads = 16"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number from 1e-12 to 0.01"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number from 1e-12 to 0.01"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5, expected a number from 1e-12 to 0.01"),
        ({"rms_norm_eps": 2**31}, "rms_norm_eps is 2147483648, expected a number from 1e-12 to 0.01"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5, expected a number from 100 to 1e.12"),
        ({"rope_theta": 2**70}, "rope_theta is 1180591620717411303424, expected a number from 100 to 1e.12"),
        ({"rope_theta": math.inf}, "rope_theta is inf, expected a number from 100 to 1e.12"),
        ({"rope_theta": math.nan}, "rope_theta is nan, expected a number from 100 to 1e.12"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
            "rope_parameters is .*llama3.*expected type",
        ),
        ({"rope_parameters": "default"}, "rope_parameters is 'default', expected type 'default'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, but rope_parameters says 10000.0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"eos_token_id": 301}, "eos_token_id is 301, expected ids from 0 to 300"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id is \[1, -1\], expected ids from 0 to 300"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id is '<.im_end.>', expected ids"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(LoadError, match=text):
        parse(**changes)


def test_the_table_has_the_names_and_shapes_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for tie in (False, True):
        config = parse(tie_word_embeddings=tie)
        theirs = transformers.Qwen2Config(**{**GOOD, "tie_word_embeddings": tie})
        with torch.device("meta"):
            model = transformers.Qwen2ForCausalLM(theirs)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if tie:
            expected.pop("lm_head.weight")  # the same tensor as the embedding, not stored
        assert tensor_shapes(config) == expected


def test_a_config_as_transformers_5_writes_it_keeps_its_rope_theta() -> None:
    """It has rope_parameters in place of rope_theta; mlx-lm 0.32.2 then takes its default of 1e6 without a word."""
    transformers = pytest.importorskip("transformers")
    written = transformers.Qwen2Config(**{**GOOD, "rope_theta": 12_345.0}).to_dict()
    assert "rope_theta" not in written
    assert Qwen2Config.from_json(written, where="m/config.json").rope_theta == 12_345.0


def test_the_facts_of_qwq_32b_preview_give_its_published_bytes() -> None:
    facts = QWQ_32B_PREVIEW
    config = parse(**{name: getattr(facts, name) for name in SIZES if hasattr(facts, name)}, eos_token_id=151_645)
    shapes = tensor_shapes(config)
    assert len(shapes) == 771
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == facts.source_bytes


def test_the_config_of_qwq_32b_preview_gives_its_published_table(shared: Path) -> None:
    path = shared / "qwq" / "config.json"
    config = Qwen2Config.from_json(json.loads(path.read_text()), where=str(path))
    table = json.loads((shared / "qwq" / "tensors.json").read_text())
    published = {name: tuple(shape) for name, shape in table["tensors"].items()}
    assert tensor_shapes(config) == published


def test_every_model_of_the_facts_is_a_valid_config() -> None:
    for facts in MODELS:
        sizes = {name: getattr(facts, name) for name in SIZES if hasattr(facts, name)}
        assert parse(**sizes, eos_token_id=None).head_dim % 2 == 0


def test_equal_tables_pass() -> None:
    shapes = tensor_shapes(parse())
    check_tensors(shapes, dict(shapes), where="m")


def test_every_difference_of_the_tensors_is_named_and_counted() -> None:
    shapes = tensor_shapes(parse())
    found = dict(shapes)
    del found["model.norm.weight"], found["lm_head.weight"]
    found["model.layers.3.input_layernorm.weight"] = (96,)
    found["model.layers.0.self_attn.k_proj.weight"] = (96, 32)
    with pytest.raises(LoadError) as caught:
        check_tensors(shapes, found, where="m")
    assert str(caught.value).splitlines() == [
        "m: the tensors are not those that config.json describes.",
        "2 missing: lm_head.weight, model.norm.weight.",
        "1 unknown: model.layers.3.input_layernorm.weight.",
        "1 of another shape: model.layers.0.self_attn.k_proj.weight (96, 32), expected (32, 96).",
        "Config and shards must come from the same commit of the same model; fetch both again.",
    ]


def test_a_long_list_of_differences_is_cut_and_counted() -> None:
    with pytest.raises(LoadError, match=r"39 missing: .* and 19 more\."):
        check_tensors(tensor_shapes(parse()), {}, where="m")
