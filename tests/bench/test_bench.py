"""The benchmark: contestants take turns, rates are n - 1 intervals, and both loops run the same arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.bench import __main__ as command
from qwq_mlx.bench import decode as contest
from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.bench.timing import BenchOptions, Rates, compare, decode_tok_s
from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.load import load_model

SMALL = Qwen2Config(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    tie_word_embeddings=False,
    eos_token_ids=(),
)


class Clock:
    """A clock that a contestant moves by what its tokens take."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def tokens(self, seconds: Iterable[float]) -> Iterable[int]:
        for index, token_s in enumerate(seconds):
            self.now_s += token_s
            yield index


def test_the_first_token_starts_the_clock() -> None:
    clock = Clock()
    assert decode_tok_s(clock.tokens([50.0, 0.25, 0.25, 0.5]), clock=clock) == pytest.approx(3.0)


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_a_run_without_an_interval_is_refused(n_tokens: int) -> None:
    text = (
        "The run gave 0 tokens, expected at least 2" if n_tokens == 0 else "The run gave 1 token, expected at least 2"
    )
    with pytest.raises(GenerationError, match=text):
        decode_tok_s(range(n_tokens))


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    clock, order = Clock(), []

    def contestant(name: str, seconds: Iterable[float]) -> Callable[[], Iterable[int]]:
        each = iter(seconds)

        def run() -> Iterable[int]:
            order.append(name)
            return clock.tokens([0.0, next(each)])

        return run

    rates = compare(
        {"a": contestant("a", [9, 1, 4, 2]), "b": contestant("b", [9, 0.5, 0.5, 0.5])}, repeats=3, clock=clock
    )
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert rates["a"] == Rates(runs=(1.0, 0.25, 0.5))
    assert (rates["a"].median, rates["b"].median) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_tokens": 1}, "tokens is 1, expected a whole number from 2 to 30,000"),
        ({"repeats": 0}, "repeats is 0, expected a whole number from 1 to 10,000"),
        ({"n_layers": 65}, "layers is 65, expected a whole number from 0 to 64"),
        ({"n_layers": -1}, "layers is -1, expected a whole number from 0 to 64"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        BenchOptions(**changes)


def test_the_qwq_shape_is_that_of_the_facts() -> None:
    config, packed = qwq_shaped(2)
    assert (config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size) == (
        5120,
        27648,
        128,
        152064,
    )
    assert len(packed) == 2 * 7 + 2


def test_a_random_module_has_finite_logits_of_a_sane_size_and_its_twin_the_same_codes() -> None:
    packed = dict.fromkeys(
        ["model.embed_tokens", "lm_head"]
        + [
            f"model.layers.{layer}.{name}"
            for layer in range(2)
            for name in (
                *(f"self_attn.{part}_proj" for part in "qkvo"),
                *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            )
        ],
        Packing(bits=4, group_size=64),
    )
    module = random_module(SMALL, packed, "float32", seed=3)
    ids = mx.array([[1, 2, 3, 300]])
    logits = np.array(module(ids))
    assert logits.shape == (1, 4, 320)
    assert 0.1 < logits.std() < 10
    twin = in_compute_type(module, SMALL, packed, "bfloat16")
    assert twin.lm_head.scales.dtype == mx.bfloat16
    assert mx.array_equal(twin.lm_head.weight, module.lm_head.weight).item()
    close = np.array(twin(ids).astype(mx.float32))
    assert np.abs(close - logits).max() < 0.1 * np.abs(logits).max()


def test_a_random_module_may_be_left_unpacked() -> None:
    logits = np.array(random_module(SMALL, {}, "float32", seed=3)(mx.array([[1, 2, 3, 300]])))
    assert logits.shape == (1, 4, 320)
    assert 0.1 < logits.std() < 10


@pytest.mark.tiny
def test_both_loops_give_the_asked_number_of_ids_and_greedily_the_same(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwq_mlx.options import Sampling

    monkeypatch.setattr(contest, "_sampling", lambda: Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0))
    model = load_model(tiny_checkpoint)
    ours = [token.id for token in contest._our_ids(model.module, [1, 2], model.tokenizer.n_ids, 9)]
    theirs = [int(token) for token, _ in contest._their_ids(model.module, [1, 2], 9)]
    assert len(ours) == 9
    assert ours == theirs


@pytest.mark.tiny
def test_the_command_prints_a_table_and_one_json_line(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[BenchOptions] = []

    def shaped(options: BenchOptions, progress: object) -> contest.Row:
        asked.append(options)
        rates = {"qwq_mlx": Rates(runs=(3.0, 1.0, 2.0)), "mlx-lm, same arrays": Rates(runs=(1.0, 1.0, 1.0))}
        return contest.Row(model="shaped", level="ids", n_tokens=8, rates=rates)

    monkeypatch.setattr(contest, "bench_qwq_shaped", shaped)
    code = command.main(["--model", str(tiny_checkpoint), "--tokens", "3", "--repeats", "2", "--layers", "7"])
    out, err = capsys.readouterr()
    assert code == 0
    assert asked == [BenchOptions(n_tokens=3, repeats=2, n_layers=7)]
    *table, line = out.splitlines()
    rows = json.loads(line)["rows"]
    assert [(row["model"].split()[0], row["level"]) for row in rows] == [
        ("checkpoint", "ids"),
        ("checkpoint", "text"),
        ("shaped", "ids"),
    ]
    assert rows[2]["median_tok_s"]["qwq_mlx"] == 2.0
    assert rows[2]["ratio"] == {"mlx-lm, same arrays": 2.0}
    assert len(rows[0]["runs_tok_s"]["mlx-lm, same arrays"]) == 2
    assert len(table) == 4
    assert "2.0" in table[-1] and "1.0 (2.00x)" in table[-1]
    assert json.loads(line)["machine"]["mlx-lm"]
    assert "round 2 of 2" in err


def test_layers_zero_leaves_the_shaped_model_out(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "bench_folder", lambda *_: [])
    monkeypatch.setattr(contest, "bench_qwq_shaped", lambda *_: pytest.fail("was measured"))
    assert command.main(["--model", str(tiny_checkpoint), "--layers", "0"]) == 0


def test_wrong_options_and_folders_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--tokens", "1"]) == 2
    assert capsys.readouterr().err == "error: --tokens is 1, expected a whole number from 2 to 30,000.\n"
    assert command.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: there is no such folder." in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "bench_folder", interrupted)
    assert command.main(["--model", "x"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was changed.\n"


def test_the_pocket_is_converted_as_for_every_command_where_no_conversion_is_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qwq_mlx.convert
    from qwq_mlx import default_model

    choice = default_model.Choice(folder=tmp_path / "cache" / "pocket", note="model: the pocket", source=tmp_path)
    monkeypatch.setattr(default_model, "choose_model", lambda named: choice)
    converted: list[tuple[Path, Path, str]] = []
    monkeypatch.setattr(
        qwq_mlx.convert, "convert_checkpoint", lambda *paths, recipe, quality: converted.append((*paths, recipe))
    )
    benched: list[Path] = []
    monkeypatch.setattr(contest, "bench_folder", lambda folder, *_: benched.append(folder) or [])
    assert command.main(["--layers", "0"]) == 0
    assert converted == [(tmp_path, choice.folder, "pocket-4bit")]
    assert benched == [choice.folder]
    assert "model: the pocket" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from qwq_mlx.bench.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print(sorted({'mlx', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith("\n[]\n")
    assert "--layers N" in done.stdout
