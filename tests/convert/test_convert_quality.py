"""The quality number: measured where it should be, in manifest and page, the same after any interruption."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint
from faulty_disk import FaultyDisk
from hub_server import HubServer, Repository

from qwq_mlx.convert import ConvertProgress, Plan, convert_checkpoint
from qwq_mlx.convert import quality_step as judge
from qwq_mlx.convert.__main__ import main
from qwq_mlx.errors import OptionError
from qwq_mlx.files.manifest import read_manifest, verify_full
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.quality.measure import measure
from qwq_mlx.quality.result import summarise
from qwq_mlx.quality.text import read_text

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("quality") / "source", n_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "essay.txt"
    path.write_text("Wait, is the answer so? The answer is in the end. " * 2)
    return path


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; the manifest without the figures of the run."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    return {**found, "manifest.json": replace(read_manifest(folder), run={})}


def test_the_number_of_a_text_is_in_manifest_page_and_result(source: Path, text: Path, tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    plans: list[Plan] = []
    done = convert_checkpoint(source, tmp_path / "out", quality=text, on_plan=plans.append, progress=seen.append)
    files, model = open_model_folder(source), open_model_folder(tmp_path / "out")
    tokenizer = load_tokenizer(source, vocab_size=320)
    own = read_text(text, tokenizer, files.config)
    expected = summarise(measure(files, [model], own)[0], own, tokenizer)
    manifest = verify_full(tmp_path / "out")
    assert manifest.quality is not None
    assert manifest.quality == json.loads(json.dumps(expected.as_mapping()))
    assert (done.kl, done.top1_agreement) == (expected.kl, expected.top1_agreement)
    assert done.logprob_loss == pytest.approx(math.log(expected.perplexity / expected.reference_perplexity), abs=1e-9)
    assert manifest.files["report.html"].size_bytes == (tmp_path / "out" / "report.html").stat().st_size
    assert "essay.txt" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{own.n_tokens:,} tokens of essay.txt, both models layer by layer: about 0:" in plans[0].quality_note
    phases = [each.phase for each in seen]
    assert phases.index("convert") < phases.index("quality") < phases.index("check")
    convert_checkpoint(source, tmp_path / "again", quality=text)
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize(
    ("quality", "small_bytes", "measured"),
    [(None, 10**9, "reasoning.jsonl"), (None, 0, None), (False, 10**9, None), (True, 0, "reasoning.jsonl")],
)
def test_small_sources_are_measured_unasked_and_large_ones_on_request(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quality: bool | None,
    small_bytes: int,
    measured: str | None,
) -> None:
    monkeypatch.setattr(judge, "SMALL_BYTES", small_bytes)
    monkeypatch.setattr("qwq_mlx.quality.text.DEFAULT_POSITIONS", 200)
    convert_checkpoint(source, tmp_path / "out", quality=quality)
    record = read_manifest(tmp_path / "out").quality
    assert (record and record["text"]) == measured
    assert (tmp_path / "out" / "report.html").exists() == (measured is not None)
    if record is not None:
        assert record["n_positions"] == 200


def test_interrupted_while_measuring_only_the_measurement_is_done_again(
    source: Path, text: Path, tmp_path: Path
) -> None:
    def press(progress: ConvertProgress) -> None:
        if progress.phase == "quality":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", quality=text, progress=press)
    assert not (tmp_path / "out").exists()
    resumed = convert_checkpoint(source, tmp_path / "out", quality=text)
    assert resumed.resumed_bytes == sum(
        e.end - e.start for _, e in open_model_folder(source).checkpoint.tensors.values()
    )
    convert_checkpoint(source, tmp_path / "whole", quality=text)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "other", quality=text, progress=press)
    convert_checkpoint(source, tmp_path / "other", quality=False)
    assert not (tmp_path / "other" / "report.html").exists()
    verify_full(tmp_path / "other")


def test_a_crash_near_the_end_never_publishes_a_folder_without_its_page(
    source: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "count").mkdir()
    with FaultyDisk(tmp_path / "count") as disk:
        convert_checkpoint(source, tmp_path / "count" / "out", quality=text)
    expected = content(tmp_path / "count" / "out")
    for back, kind in ((2, "kill"), (6, "torn"), (9, "kill"), (13, "torn")):
        folder = tmp_path / f"{kind}-{back}"
        folder.mkdir()
        with FaultyDisk(folder, at=disk.n_operations - back, kind=kind):
            convert_checkpoint(source, folder / "out", quality=text)
        if not (folder / "out").exists():
            convert_checkpoint(source, folder / "out", quality=text)
        assert content(folder / "out") == expected


def test_a_flipped_bit_of_the_page_is_found(source: Path, text: Path, tmp_path: Path) -> None:
    from qwq_mlx.errors import SourceError

    convert_checkpoint(source, tmp_path / "out", quality=text)
    page = tmp_path / "out" / "report.html"
    page.write_bytes(page.read_bytes().replace(b"mean KL", b"mean kl"))
    with pytest.raises(SourceError, match=r"1 of other bytes than the manifest's: report\.html"):
        verify_full(tmp_path / "out")


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.repositories["a/b"] = Repository()
        server.repositories["a/b"].push({path.name: path.read_bytes() for path in source.iterdir()})
        yield server


def test_from_the_hub_the_source_must_be_kept(
    server: HubServer, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    with pytest.raises(
        OptionError, match=r"shards from the Hub are dropped .* Add `keep_source=True`, or convert with `quality=False`"
    ):
        convert_checkpoint("a/b", tmp_path / "out", quality=text)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(judge, "SMALL_BYTES", 10**9)
    convert_checkpoint("a/b", tmp_path / "plain", on_plan=plans.append)
    assert read_manifest(tmp_path / "plain").quality is None
    assert plans[0].quality_note.startswith("not measured: quality needs the whole source")
    kept = convert_checkpoint("a/b", tmp_path / "kept", quality=text, keep_source=True)
    assert kept.kl == convert_checkpoint(source, tmp_path / "local", quality=text).kl
    assert kept.kl is not None
    assert server.n_bytes_sent > 0


def test_what_cannot_be_measured_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, object]]] = [
        (r"nowhere\.txt: there is no such file\. Give a text", {"quality": tmp_path / "nowhere.txt"}),
        ("quality_tokens says how much is measured, and `quality=False`", {"quality": False, "quality_tokens": 99}),
        ("3 tokens of text are asked for, expected at least 32", {"quality_tokens": 3}),
    ]
    for message, options in cases:
        with pytest.raises(OptionError, match=message):
            convert_checkpoint(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_the_loader_cannot_run_is_converted_without_a_number(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwq_mlx.errors import LoadError

    def cannot(*_: object, where: str) -> None:
        raise LoadError(f"{where}: no such mode")

    monkeypatch.setattr("qwq_mlx.model.layout.packings", cannot)
    with pytest.raises(OptionError, match="quality cannot be measured with this recipe: qwq-32b-preview-4bit: no such"):
        convert_checkpoint(source, tmp_path / "out", quality=True)
    monkeypatch.setattr(judge, "SMALL_BYTES", 10**9)
    plans: list[Plan] = []
    convert_checkpoint(source, tmp_path / "out", on_plan=plans.append)
    assert plans[0].quality_note.startswith("not measured: quality cannot be measured with this recipe")


def test_the_flags_reach_the_measurement(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--source", str(source), "--json", "--output"]
    assert main([*command, str(tmp_path / "a"), "--quality", str(text), "--quality-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    record = read_manifest(tmp_path / "a").quality
    assert record is not None
    assert (record["text"], record["n_positions"]) == ("essay.txt", 40)
    assert json.loads(out)["kl"] == record["kl"]
    assert "quality 39 tokens of essay.txt" in err
    monkeypatch.setattr(judge, "SMALL_BYTES", 10**9)
    assert main([*command, str(tmp_path / "b"), "--no-quality"]) == 0
    assert read_manifest(tmp_path / "b").quality is None
    assert "quality not measured (--no-quality)" in capsys.readouterr().err
    monkeypatch.setattr(judge, "SMALL_BYTES", 0)
    assert main([*command, str(tmp_path / "c"), "--quality-tokens", "150", "--quality"]) == 0
    record = read_manifest(tmp_path / "c").quality
    assert record is not None
    assert (record["text"], record["n_positions"]) == ("reasoning.jsonl", 150)
    with pytest.raises(SystemExit) as stopped:
        main([*command, str(tmp_path / "d"), "--no-quality", "--quality"])
    assert stopped.value.code == 2
    capsys.readouterr()
    assert main([*command, str(tmp_path / "e")]) == 0
    said = capsys.readouterr().err
    assert re.search(
        r"quality not measured; --quality measures it on a bundled text, in about \d+:\d\d more at most", said
    )


def test_a_template_that_fails_is_a_reason_not_to_measure_but_to_refuse_where_it_was_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path(shutil.copytree(source, tmp_path / "odd"))
    (odd / "chat_template.jinja").write_text("{{ raise_exception('no thanks') }}")
    with pytest.raises(OptionError, match=r"reasoning\.jsonl, line 1: .*no thanks"):
        convert_checkpoint(odd, tmp_path / "out", quality=True)
    monkeypatch.setattr(judge, "SMALL_BYTES", 10**9)
    plans: list[Plan] = []
    convert_checkpoint(odd, tmp_path / "out", on_plan=plans.append)
    assert "not measured: " in plans[0].quality_note and "no thanks" in plans[0].quality_note
    assert read_manifest(tmp_path / "out").quality is None
