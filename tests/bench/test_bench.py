"""The benchmark: contestants take turns, rates are n - 1 intervals, and both loops run the same arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from configs import SMALL

from qwq_mlx.bench import __main__ as command
from qwq_mlx.bench import decode, folders, loops, machine, subject
from qwq_mlx.bench.decode import byte_limit
from qwq_mlx.bench.loops import our_ids, their_ids
from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.bench.options import BenchOptions
from qwq_mlx.bench.report import table
from qwq_mlx.bench.subject import Bench, Row, Target
from qwq_mlx.bench.timing import Runs, decode_tok_s, take_turns
from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.load import load_model
from qwq_mlx.options import Sampling


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
    order: list[str] = []

    def contestant(name: str, figures: list[float]) -> Callable[[], float]:
        each = iter(figures)

        def run() -> float:
            order.append(name)
            return next(each)

        return run

    told: list[str] = []
    runs = take_turns(
        {"a": contestant("a", [9, 1, 4, 2]), "b": contestant("b", [9, 0.5, 0.5, 0.5])}, repeats=3, progress=told.append
    )
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert runs["a"] == Runs((1, 4, 2))
    assert (runs["a"].median, runs["a"].spread, runs["b"].spread) == (2, 1.5, 0)
    assert told[-1] == "round 3 of 3: a"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_tokens": 1}, "tokens is 1, expected a whole number from 2 to 30,000"),
        ({"repeats": 0}, "repeats is 0, expected a whole number from 1 to 10,000"),
        ({"n_layers": 65}, "layers is 65, expected a whole number from 0 to 64"),
        ({"n_layers": -1}, "layers is -1, expected a whole number from 0 to 64"),
        ({"contexts": (0, -1)}, "contexts is -1, expected a whole number from 0 to 1,000,000"),
        ({"n_prompt": 1}, "n_prompt is 1, expected a whole number from 2"),
        ({"rows": (1, 0)}, "rows is 0, expected a whole number from 1 to 1,024"),
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


def test_each_code_of_a_random_word_takes_every_value_and_norms_and_biases_are_no_constants() -> None:
    module = random_module(SMALL, {"lm_head": Packing(bits=4, group_size=64)}, "float32", seed=3)
    words = np.array(module.lm_head.weight).ravel()
    for place in range(8):
        counts = np.bincount(words >> 4 * place & 15, minlength=16)
        assert counts.min() > 0.7 * words.size / 16
    layer = module.layers[1]
    for each in (layer.input_layernorm.weight, layer.self_attn.q_proj.bias, module.model.norm.weight):
        assert np.array(each).std() > 0.1


def test_a_random_module_may_be_left_unpacked() -> None:
    logits = np.array(random_module(SMALL, {}, "float32", seed=3)(mx.array([[1, 2, 3, 300]])))
    assert logits.shape == (1, 4, 320)
    assert 0.1 < logits.std() < 10


@pytest.mark.tiny
@pytest.mark.parametrize("n_filled", [0, 40])
def test_both_loops_give_the_asked_number_of_ids_and_greedily_the_same(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, n_filled: int
) -> None:
    monkeypatch.setattr(loops, "sampling", lambda: Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0))
    model = load_model(tiny_checkpoint)
    prompt = loops.prompt_of(n_filled + 2, model.tokenizer.n_ids)
    mx.random.seed(5)  # of the keys and values that stand for what was read before
    ours = [token.id for token in our_ids(model.module, prompt, model.tokenizer.n_ids, 9, n_filled=n_filled)]
    mx.random.seed(5)
    theirs = [int(token) for token, _ in their_ids(model.module, prompt, 9, n_filled=n_filled)]
    assert len(ours) == 9
    assert ours == theirs


def test_behind_the_last_timed_token_the_next_pass_is_under_way_as_behind_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[list[int]] = []

    def ids(*arguments: Any, n_filled: int) -> Iterator[int]:
        """A loop of as many tokens as it is asked for. left: those that nobody took."""
        left.append(list(range(arguments[-1])))
        while left[-1]:
            yield left[-1].pop()

    for name in ("our_ids", "their_ids"):
        monkeypatch.setattr(decode, name, ids)
    monkeypatch.setattr(decode, "byte_limit", lambda *_: None)
    bench = SimpleNamespace(turns=lambda all, what: {name: [run()] for name, run in all.items()}, bandwidth=1.0)
    target = SimpleNamespace(module=None, theirs=None, twin=0, n_ids=9, name="a model")
    assert len(decode._ids_row(bench, target, 0, 2).runs) == 3  # type: ignore[arg-type]
    assert left == [[0]] * 3


@pytest.mark.tiny
def test_samples_of_one_prefill_draw_what_runs_of_their_seeds_draw(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    n_ids, prompt = model.tokenizer.n_ids, loops.prompt_of(5, model.tokenizer.n_ids)
    alone = [[token.id for token in our_ids(model.module, prompt, n_ids, 9, seed=seed)] for seed in range(3)]
    assert loops.our_samples(model.module, prompt, n_ids, 9, n_rows=3) == alone


@pytest.mark.tiny
def test_a_newcomer_is_fed_in_chunks_between_the_passes_of_others(tiny_checkpoint: Path) -> None:
    """20 ids, the last of them with its first pass: 19 in chunks of 8 are three, each with a token of the others."""
    model = load_model(tiny_checkpoint)
    newcomer = loops.prompt_of(20, model.tokenizer.n_ids)
    alone, fed = loops.our_waits(model.module, newcomer, model.tokenizer.n_ids, 8, n_rows=2, n_alone=4)
    assert (len(alone), len(fed)) == (4, 3) and min(alone + fed) > 0
    assert len(loops.their_waits(model.module, newcomer, 8, n_rows=2)) >= 3


def row(unit: str = "tok/s", **changes: Any) -> Row:
    runs = {"qwq_mlx": Runs((3.0, 1.0, 2.0)), "mlx-lm, same arrays": Runs((1.0, 1.0, 1.0))}
    return Row(**{"subject": "decode", "model": "m", "setting": "ids", "unit": unit, "runs": runs, **changes})


def test_times_as_fast_turns_round_where_less_is_better() -> None:
    assert row("tok/s").times_as_fast("mlx-lm, same arrays") == 2.0
    assert row("s").times_as_fast("mlx-lm, same arrays") == 0.5


def test_the_table_shows_medians_half_spreads_ratios_and_the_byte_limit() -> None:
    lines = table([row(byte_limit=8.0), row("ms", subject="rows")]).splitlines()
    assert lines[0].split("  ")[0] == "decode, tok/s"
    assert "2 ±50%" in lines[1] and "1 ±0% (2.00x)" in lines[1] and "8 (25% reached)" in lines[1]
    assert lines[3].startswith("rows, ms") and "byte limit" not in lines[3]


def test_the_byte_limit_reads_weights_but_the_embedding_and_the_cache() -> None:
    module = random_module(SMALL, {}, "float32", seed=3)
    target = Target(name="m", module=module, theirs=module, config=SMALL, n_ids=320)
    layer = 128 * 128 + 128 + 2 * (64 * 128 + 64) + 128 * 128 + 3 * 128 * 192 + 2 * 128
    n_bytes = 4 * (2 * layer + 128 + 320 * 128)
    assert byte_limit(target, 1e9, 0) == pytest.approx(1e9 / n_bytes)
    assert byte_limit(target, 1e9, 100) == pytest.approx(1e9 / (n_bytes + 100 * 2 * 2 * 2 * 32 * 4))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "read_bandwidth", lambda: 1e9)


@pytest.mark.tiny
@pytest.mark.usefixtures("quick")
def test_the_command_prints_a_table_and_one_json_line_and_appends_it(
    known_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every subject once, on a tiny model; the context that it does not have is left out with a word."""
    given = ["--model", str(known_checkpoint), "--source", str(known_checkpoint), "--layers", "0", "--repeats", "1"]
    sizes = ["--tokens", "3", "--rows", "3", "--prompt-tokens", "20", "--chunks", "8", "--contexts", "0", "300000"]
    results = tmp_path / "results"
    code = command.main([*command.SUBJECTS, *given, *sizes, "--output", str(results)])
    out, err = capsys.readouterr()
    assert code == 0, err
    line = out.splitlines()[-1]
    result = json.loads(line)
    figures = [(each["subject"], each["setting"], sorted(each["median"])) for each in result["rows"]]
    both = ["mlx-lm as it loads", "mlx-lm, same arrays", "qwq_mlx"]
    of_disk = ["mlx-lm as it loads", "qwq_mlx", "reading the files"]
    assert figures == [
        ("decode", "ids, context 0", both),
        ("decode", "text", both),
        ("prefill", "20 tokens", both),
        ("rows", "3 rows", both[1:]),
        ("samples", "3 samples of 3 tokens behind 64", ["mlx-lm, one by one", *both[1:]]),
        ("stall", "4 rows, a prompt of 20 ids in chunks of 8", ["mlx-lm, same arrays", "no newcomer", "qwq_mlx"]),
        ("load", "weights and tokenizer", of_disk),
        ("first-token", "load, prompt, one token", of_disk),
        ("convert", "4 bits, min/max", ["mlx_lm.convert", "qwq_mlx"]),
    ]
    assert all(value > 0 for each in result["rows"] for value in each["median"].values())
    assert result["rows"][0]["fraction_of_limit"] > 0
    assert {"power", "commit", "mlx-lm", "backend", "device"} <= set(result["machine"])
    assert (result["schema"], result["load_before"] >= 0) == (2, True)
    assert "context 300,000 is left out" in err and "round 1 of 1" in err
    ours = result["rows"][0]["median"]["qwq_mlx"]
    assert f"ids, context 0: medians: qwq_mlx {ours:.4g}, mlx-lm, same arrays" in err
    [file] = results.iterdir()
    assert file.name == f"{result['date'][:10]}.jsonl"
    assert file.read_text() == line + "\n"


@pytest.mark.usefixtures("quick")
def test_the_default_is_decode_alone_and_layers_zero_leaves_the_shaped_model_out(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Bench] = []
    monkeypatch.setattr("qwq_mlx.bench.decode.bench_decode", lambda bench: asked.append(bench) or [row()])
    monkeypatch.setattr(Bench, "_qwq_shaped", lambda _: "shaped")
    monkeypatch.setattr(Bench, "_of_folder", lambda _: "folder")
    for n_layers in ("0", "3"):
        assert command.main(["--model", str(tiny_checkpoint), "--layers", n_layers, "--tokens", "5"]) == 0
    assert command.main(["--shaped-only", "--layers", "3"]) == 0
    assert [bench.targets for bench in asked] == [["folder"], ["folder", "shaped"], ["shaped"]]
    assert asked[1].options == BenchOptions(n_tokens=5, n_layers=3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["decode", "load", "--shaped-only"], "load measures a model folder, which --shaped-only leaves out"),
        (["--shaped-only", "--layers", "0"], "are both left out"),
        (["--shaped-only", "--model", "mine"], "--model mine is left out by --shaped-only"),
    ],
)
def test_subjects_that_nothing_is_left_for_are_refused(
    given: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(given) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["decod"], "there is no subject 'decod', expected some of decode, prefill, rows"),
    ],
)
def test_a_subject_that_there_is_not_is_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    assert command.main(["--output", str(tmp_path / "taken")]) == 1
    assert "taken: cannot be made (File exists)" in capsys.readouterr().err


def test_a_failed_conversion_of_theirs_does_not_print_on_stdout(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders._their_conversion(tiny_checkpoint, tmp_path / "q")
    assert capsys.readouterr().out == ""


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, *(float(second) for second in range(10, 30))])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.read_bandwidth(1 << 20) == machine._READS * (1 << 20)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Now drawing from 'AC Power'", "AC power"),
        ("Now drawing from 'Battery Power'", "battery"),
        ("", "unknown"),
    ],
)
def test_a_macs_power_source_is_read_from_pmset(monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "_first_line", lambda *command: said if command == ("pmset", "-g", "batt") else "?")
    assert machine.power_source() == expected


@pytest.mark.parametrize(("online", "expected"), [([], "unknown"), (["0"], "battery"), (["0", "1"], "AC power")])
def test_elsewhere_from_the_systems_supplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: list[str], expected: str
) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "_SUPPLIES", tmp_path)
    for number, text in enumerate(online):
        (tmp_path / f"AC{number}").mkdir()
        (tmp_path / f"AC{number}" / "online").write_text(text + "\n")
    assert machine.power_source() == expected


def test_outside_a_checkout_the_commit_is_unknown_and_a_missing_program_says_nothing(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == "unknown"
    assert machine._first_line("no-such-program-anywhere") == ""


def test_wrong_options_and_folders_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--tokens", "1"]) == 2
    assert capsys.readouterr().err == "error: --tokens is 1, expected a whole number from 2 to 30,000.\n"
    assert command.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: there is no such folder." in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwq_mlx.bench.decode.bench_decode", interrupted)
    assert command.main(["--model", "x"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was changed.\n"


def test_the_pocket_is_converted_as_for_every_command_where_no_conversion_is_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qwq_mlx.convert
    from qwq_mlx import default_model

    choice = default_model.Choice(
        folder=tmp_path / "cache" / "pocket", note="model: the pocket", source=tmp_path, recipe="pocket-4bit"
    )
    monkeypatch.setattr(default_model, "choose_model", lambda named: choice)
    converted: list[tuple[Path, Path, str]] = []
    monkeypatch.setattr(
        qwq_mlx.convert, "convert_checkpoint", lambda *paths, recipe, **_: converted.append((*paths, recipe))
    )
    benched: list[Path] = []
    monkeypatch.setattr("qwq_mlx.bench.decode.bench_decode", lambda bench: benched.append(bench.folder) or [])
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
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.endswith("\n[]\n")
    assert "--layers N" in shown.stdout
