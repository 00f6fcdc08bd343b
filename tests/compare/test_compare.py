"""The compare command: rows beside their sizes, every flag, and everything it refuses before a layer is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.compare.__main__ import main
from qwq_mlx.compare.table import compare_models
from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.errors import LoadError, OptionError
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quality.measure import measure
from qwq_mlx.quality.result import summarise
from qwq_mlx.quality.text import read_text

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, and two conversions of it: 4 and 8 bits; a text."""
    home = tmp_path_factory.mktemp("compare")
    write_tiny_checkpoint(home / "checkpoint")
    for bits in (4, 8):
        recipe = home / f"bits-{bits}.toml"
        recipe.write_text(f'[weights]\nmode = "affine"\nbits = {bits}\ngroup_size = 64\nfit = "min-max"\n')
        convert_checkpoint(home / "checkpoint", home / f"bits-{bits}", recipe=recipe)
    (home / "essay.txt").write_text("Wait, is the answer so? The answer is in the end. " * 4)
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_rows_say_what_each_takes_and_lost(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, home / "checkpoint", home / "bits-4", home / "bits-8", "--text", home / "essay.txt")
    assert (code, err) == (0, "")
    files = [open_model_folder(home / name) for name in ("checkpoint", "bits-4", "bits-8")]
    tokenizer = load_tokenizer(home / "checkpoint", vocab_size=320)
    text = read_text(home / "essay.txt", tokenizer, files[0].config)
    four, eight = (summarise(each, text, tokenizer) for each in measure(files[0], files[1:], text))
    lines = out.splitlines()
    assert f"{files[0].checkpoint.tensor_bytes / 1e6:.2f} MB  16.00  reference" in lines[1]
    assert lines[1].endswith(f"{four.reference_perplexity:.4f}")
    assert "bits-4" in lines[2] and f"   4.54  {four.kl:.3e}" in lines[2]
    assert f"{100 * four.top1_agreement:.2f} %" in lines[2]
    assert "bits-8" in lines[3] and f"   8.53  {eight.kl:.3e}" in lines[3]
    assert lines[4].startswith(
        f"KL in nats a token, mean and 99th percentile, of {text.n_tokens:,} tokens of essay.txt"
    )
    assert lines[6].split() == ["drift,", "%", "B", "C"]
    table = [line.rsplit(maxsplit=2) for line in lines[7:]]
    assert [row[0] for row in table] == ["embedding", "layer 1", "layer 2"]
    assert [float(row[1]) for row in table] == pytest.approx([100 * each for each in four.drift], abs=5e-4)
    assert [float(row[2]) for row in table] == pytest.approx([100 * each for each in eight.drift], abs=5e-4)
    assert eight.kl < four.kl / 10


def test_json_has_everything_and_reference_and_tokens_are_honoured(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys,
        home / "bits-4",
        "--reference",
        home / "bits-8",
        "--tokens",
        "80",
        "--json",
        "--text",
        home / "essay.txt",
    )
    assert code == 0
    found = json.loads(out)
    assert [Path(row["folder"]).name for row in found["rows"]] == ["bits-8", "bits-4"]
    assert found["n_positions"] == 80
    assert found["rows"][0]["quality"] is None
    assert found["rows"][1]["quality"]["kl"] > 0
    assert len(found["rows"][1]["quality"]["drift"]) == 3
    assert found["rows"][1]["weights"] == "4-bit weights, group 64"


def test_without_a_text_the_bundled_one_is_taken_and_a_model_equals_itself(home: Path) -> None:
    found = compare_models([home / "bits-8", home / "bits-8"], n_positions=200)
    assert (found.text, found.n_positions) == ("reasoning.jsonl", 200)
    quality = found.rows[1].quality
    assert quality is not None
    assert (quality.kl, quality.top1_agreement) == (0.0, 1.0)


def edited_tokenizer(home: Path, folder: Path) -> Path:
    shutil.copytree(home / "checkpoint", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_what_cannot_be_compared_is_refused_before_a_layer_is_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("a layer was read before all checks were done")

    monkeypatch.setattr("qwq_mlx.compare.table.measure", unreachable)
    deep = write_tiny_checkpoint(tmp_path / "deep", n_layers=3)
    (tmp_path / "empty.txt").write_text("")
    first, second = home / "checkpoint", home / "bits-4"
    cases: list[tuple[type[Exception], str, list[Path], dict[str, Any]]] = [
        (OptionError, "1 folders to compare, expected at least two, or one and a `reference`", [first], {}),
        (OptionError, "0 folders to compare", [], {"reference": first}),
        (LoadError, "nowhere: there is no such folder", [first, tmp_path / "nowhere"], {}),
        (OptionError, "deep: is another model than .*: num_hidden_layers is 3, the reference has 2", [first, deep], {}),
        (
            OptionError,
            r"other: has another tokenizer than .*checkpoint: 2 tokens have other ids, such as 'a' \(65, not 64\)",
            [first, edited_tokenizer(home, tmp_path / "other")],
            {},
        ),
        (OptionError, r"empty\.txt: gives 0 tokens to measure", [first, second], {"text": tmp_path / "empty.txt"}),
        (OptionError, r"none\.txt: there is no such file", [first, second], {"text": tmp_path / "none.txt"}),
        (OptionError, "5 tokens of text are asked for, expected at least 32", [first, second], {"n_positions": 5}),
    ]
    for error, message, folders, options in cases:
        with pytest.raises(error, match=message):
            compare_models(folders, **options)


def test_exit_codes_and_messages_of_the_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, home / "checkpoint")
    assert (code, out) == (2, "") and err.startswith("error: 1 folders to compare")
    code, out, err = run(capsys, home / "checkpoint", tmp_path / "nowhere")
    assert (code, out) == (1, "") and "nowhere: there is no such folder" in err

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwq_mlx.compare.table.compare_models", interrupted)
    assert run(capsys, home / "checkpoint", home / "bits-4") == (130, "", "interrupted: nothing was changed.\n")


@pytest.mark.parametrize(("quiet", "is_shown"), [(False, True), (True, False)])
def test_progress_is_shown_on_a_terminal_unless_quiet(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool, is_shown: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = [home / "bits-4", home / "bits-8", "--text", home / "essay.txt", "--tokens", 64]
    code, _, err = run(capfd, *arguments, *(["--quiet"] if quiet else []))
    assert code == 0
    assert ("comparing: " in err) == is_shown


def test_help_comes_without_loading_anything_heavy() -> None:
    code = "import sys\nsys.argv = ['x', '--help']\nfrom qwq_mlx.compare.__main__ import main\ntry:\n    main()\n"
    code += "except SystemExit:\n    assert not {'mlx', 'transformers', 'numpy'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--reference DIR" in done.stdout
