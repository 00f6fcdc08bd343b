"""A target size: reached to less than a step, recorded in full and repeated from its record, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.convert import Plan, convert_checkpoint
from qwq_mlx.convert.__main__ import main
from qwq_mlx.errors import OptionError
from qwq_mlx.files.manifest import verify_full
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import recipe_of_mapping
from qwq_mlx.verify.check import verify_conversion

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_tiny_checkpoint(tmp_path_factory.mktemp("target") / "source", intermediate_size=256)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_output_is_no_larger_than_the_target_and_less_than_a_matrix_smaller(
    source: Path, tmp_path: Path, share: float
) -> None:
    least = convert_checkpoint(source, tmp_path / "2", recipe="2bit", dry_run=True).output_bytes
    most = convert_checkpoint(source, tmp_path / "8", recipe="8bit", dry_run=True).output_bytes
    target = int(least + share * (most - least)) + 10
    done = convert_checkpoint(source, tmp_path / "out", recipe="4bit", target_bytes=target)
    assert done.output_bytes == size(tmp_path / "out") <= target
    assert target - done.output_bytes < 3_000 + 2 * 64 * 128 // 8 * 2 or share == 0.0
    verify_full(tmp_path / "out")


def test_the_manifest_has_the_choice_in_full_and_repeats_it(source: Path, tmp_path: Path) -> None:
    target = convert_checkpoint(source, tmp_path / "4", recipe="4bit", dry_run=True).output_bytes
    plans: list[Plan] = []
    convert_checkpoint(source, tmp_path / "out", recipe="4bit", target_bytes=target, on_plan=plans.append)
    manifest = verify_full(tmp_path / "out")
    chosen = {
        each.source.name.removesuffix(".weight"): each.packing for each in plans[0].tensors if each.packing is not None
    }
    recorded = recipe_of_mapping(manifest.recipe, where=Path("manifest.json"))
    assert {path: recorded.packing_of(path, n_layers=2) for path in chosen} == chosen
    assert (
        chosen["lm_head"] == Packing(bits=5, group_size=128) and len({packing.bits for packing in chosen.values()}) > 1
    )
    assert recorded.name.startswith("4bit-0.") and recorded.name.endswith("MB") and recorded.fit == "least-squares"
    (tmp_path / "saved.toml").write_text(plans[0].recipe.text)
    convert_checkpoint(source, tmp_path / "again", recipe=tmp_path / "saved.toml")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert len(verify_conversion(tmp_path / "out", source=source, n_tensors=30).packed_again) > 20


def test_a_stopped_run_goes_on_with_the_same_choice(source: Path, tmp_path: Path) -> None:
    def press(progress: object) -> None:
        if progress.done_bytes > 0.5 * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", target_bytes=200_000, progress=press)
    assert convert_checkpoint(source, tmp_path / "out", target_bytes=200_000).resumed_bytes > 0


def refused(source: Path, message: str, **options: object) -> None:
    with pytest.raises(OptionError, match=message):
        convert_checkpoint(source, source.parent / "out", **options)
    assert not (source.parent / "out.partial").exists()


def test_a_size_that_cannot_be_reached_is_refused_with_the_smallest_and_that_one_works(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(source), "--output", str(tmp_path / "out"), "--recipe", "mixed_3_6"]
    assert main([*arguments, "--target-size", "0.05MB"]) == 2
    err = capsys.readouterr().err
    assert "a target size of 0.05MB cannot be reached: the smallest that mixed_3_6 makes of this model, 2 bits" in err
    assert "2 bits in groups of 128 everywhere, has" in err and "or more, or a recipe without overrides." in err
    smallest = err.partition(". Give ")[2].partition(" ")[0]
    assert main([*arguments, "--target-size", smallest, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["output_bytes"] <= float(smallest.removesuffix("MB")) * 1e6
    refused(source, r"Give 0\.\d+MB or more\.$", target_bytes=1, recipe="4bit-g128")
    odd = write_tiny_checkpoint(tmp_path / "odd" / "source")  # has rows of 192
    refused(odd, r"2 bits in groups of 64 everywhere, .* Give 0\.\d+MB or more\.$", target_bytes=1)


@pytest.mark.parametrize("size", ["17", "17 kB", "GB", "-1GB", "1e3MB", "17gb"])
def test_a_size_that_is_none_is_refused(
    size: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--source", str(source), "--output", str(tmp_path / "out"), f"--target-size={size}"]) == 2
    assert f"--target-size is {size!r}, expected a number and GB, GiB, MB or MiB: 17GB" in capsys.readouterr().err


def test_sizes_are_decimal_or_binary(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for text in ("0.21MB", "0.21 MiB", "0.00021GB"):
        arguments = ["--source", str(source), "--output", str(tmp_path / "out"), "--target-size", text]
        assert main([*arguments, "--dry-run", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["output_bytes"])
    assert found[0] == found[2] <= 210_000 < found[1] <= 0.21 * (1 << 20)


def test_what_a_size_cannot_go_with_is_refused(source: Path, tmp_path: Path) -> None:
    refused(source, r"mxfp4\.toml: mode 'mxfp4' has one number of bits", target_bytes=10**9, recipe="mxfp4")
    refused(source, r"target_bytes is 0, expected a whole number of bytes above 0", target_bytes=0)
    fixed = tmp_path / "fixed.toml"
    fixed.write_text('[weights]\n[[override]]\nmatch = "*"\nbits = 8\n')
    refused(source, r"fixed\.toml: its overrides name every matrix", target_bytes=10**9, recipe=fixed)
