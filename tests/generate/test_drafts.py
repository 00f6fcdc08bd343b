"""`load(draft=...)`: the same ids, bit for bit, in every way to run; and drafters that cannot be are refused first."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.engine.draft_length import CostsAt, PassCosts
from qwq_mlx.engine.pass_costs import LONG_CONTEXT, measure_costs
from qwq_mlx.errors import LoadError, OptionError
from qwq_mlx.generate import drafting
from qwq_mlx.generate.__main__ import main
from qwq_mlx.generate.drafting import DraftChoice, choose_draft
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import load_model
from qwq_mlx.model.split import Split
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.trace.trace import Trace

pytestmark = pytest.mark.tiny

HEADS = {"n_heads": 2, "n_kv_heads": 1}  # 64 wide, which a quantized cache needs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("target") / "model", **HEADS)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same tokenizer, with fewer layers and rows."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    return write_tiny_checkpoint(folder, seed=0, n_layers=1, vocab_size=312, **HEADS)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Reasoner:
    return load(folder)


@pytest.fixture(scope="module", params=["ngram", "model", "same model"])
def drafted(request: pytest.FixtureRequest, folder: Path, draft_folder: Path) -> Reasoner:
    """Drafting 3 ids whatever they cost, by texts, by another model, or by the model itself, which is always right."""
    draft = {"ngram": "ngram", "model": draft_folder, "same model": folder}[request.param]
    return load(folder, draft=draft, draft_length=3)


def settings(reasoner: Reasoner) -> dict[str, dict[str, Any]]:
    never_stop = dict.fromkeys(reasoner.model.stop_ids, float("-inf"))

    def sampling(**more: Any) -> Sampling:
        return Sampling(**{"temperature": 0.9, "seed": 3, "logit_bias": never_stop} | more)

    return {
        "greedy": {"sampling": sampling(temperature=0.0), "limits": Limits(max_tokens=40)},
        "penalties": {
            "sampling": sampling(repetition_penalty=1.3, frequency_penalty=0.2, dry_multiplier=0.8),
            "limits": Limits(max_tokens=40),
        },
        "guards": {"sampling": sampling(temperature=1.5), "limits": Limits(max_tokens=40, banned=("e",))},
        "mask": {"sampling": sampling(temperature=2.0), "limits": Limits(max_tokens=30, language_guard=True)},
        "budget": {
            "sampling": sampling(seed=9),
            "limits": Limits(max_tokens=110),
            "thinking": Thinking(think_tokens=5, answer_tokens=9),
        },
        "cache": {"sampling": sampling(), "limits": Limits(max_tokens=40, kv_bits=8)},
        "inspect": {
            "sampling": sampling(seed=5),
            "limits": Limits(max_tokens=30),
            "inspect": Inspect(top_k=3, hidden_layers=(0, 2), loop_scores=True),
        },
        "stop": {"sampling": Sampling(temperature=0.9, seed=12), "limits": Limits(max_tokens=40, stop=("t",))},
    }


def assert_same(found: Trace, expected: Trace) -> None:
    """All that a trace says but times, to the last bit."""
    for name in ("ids", "texts", "logprobs", "entropies", "alternatives", "margins", "finish_reason", "detail"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("injections", "events", "answer", "loop_scores", "settings"):
        assert getattr(found, name) == getattr(expected, name), name
    assert all(mx.array_equal(mx.array(found.hidden[layer]), mx.array(rows)) for layer, rows in expected.hidden.items())


def test_every_kind_of_run_is_what_it_is_without_drafts(
    plain: Reasoner, drafted: Reasoner, request: pytest.FixtureRequest
) -> None:
    n_drafted = 0
    for name, each in settings(plain).items():
        expected, found = (reasoner.generate("3 + 4 * 5", **each) for reasoner in (plain, drafted))
        assert len(expected.ids) > 5 or name == "stop"
        assert_same(found, expected)
        assert expected.timings.drafted == {}
        n_drafted += sum(found.timings.drafted.values())
        assert all(found.timings.accepted[source] <= n for source, n in found.timings.drafted.items())
    assert drafted.drafts is not None
    counts = drafted.drafts.counts
    assert n_drafted == sum(counts.drafted.values())
    assert sum(counts.drafted.values()) > 50
    if request.node.callspec.params["drafted"] == "same model":
        # what is behind the end of a run, or an injection, is lost
        assert sum(counts.accepted.values()) > 0.8 * sum(counts.drafted.values())


def test_a_hook_of_the_users_sees_each_token_once(plain: Reasoner, drafted: Reasoner) -> None:
    """Its row decodes without drafts: what is drafted and not drawn would be in the tokens that it sees."""
    sizes: list[int] = []

    def hook(tokens: mx.array, logits: mx.array) -> mx.array:
        sizes.append(tokens.size)
        return logits.at[:, tokens].add(-1.0)

    each = {"sampling": Sampling(temperature=0.9, seed=2), "limits": Limits(max_tokens=20)}
    traces = [reasoner.generate("x", logits_processors=[hook], **each) for reasoner in (plain, drafted)]
    assert_same(traces[1], traces[0])
    n_each = len(sizes) // 2
    assert sizes[:n_each] == sizes[n_each:] == sorted(set(sizes))


def test_saved_resumed_and_forked_anywhere_it_goes_on_alike(plain: Reasoner, drafted: Reasoner, tmp_path: Path) -> None:
    each = {"sampling": Sampling(temperature=0.9, seed=4), "limits": Limits(max_tokens=24)}
    plain_run = plain.stream("How many r?", **each)
    for _ in plain_run:
        pass
    expected, forked = plain_run.trace(), [step.id for step in plain_run.fork(at=4, seed=8)]
    run = drafted.stream("How many r?", **each)
    for step in run:
        assert step.index == len(run.run.steps) - 1  # one token at a time, whatever was drafted
        if step.index in (2, 5, 6, 9):
            run.save(tmp_path / "run")
            for reasoner in (plain, drafted):
                resumed = reasoner.resume(tmp_path / "run")
                for _ in resumed:
                    pass
                assert_same(resumed.trace(), expected)
        if step.index in (5, 6, 7):
            assert [each.id for each in run.fork(at=4, seed=8)] == forked
    assert_same(run.trace(), expected)


def test_batches_votes_and_receipts_are_alike(plain: Reasoner, drafted: Reasoner) -> None:
    """At 7 rows or fewer in a pass, drafts included, to the last bit."""
    questions, limits = ["x", "1 + 1", "a longer question"], Limits(max_tokens=30)
    traces = [
        reasoner.batch_generate(questions, sampling=Sampling(temperature=0.9, seed=3), limits=limits)
        for reasoner in (plain, drafted)
    ]
    for expected, found in zip(*traces, strict=True):
        assert_same(found, expected)
    votes = [
        reasoner.vote("x", 5, sampling=Sampling(temperature=0.9, seed=3), limits=limits, ask_answer=False)
        for reasoner in (plain, drafted)
    ]
    assert [trace.ids for trace in votes[0].traces] == [trace.ids for trace in votes[1].traces]
    again = drafted.rerun(plain.receipt(traces[0][1]))
    assert tuple(step.id for step in again) == traces[0][1].ids


def test_a_stopped_run_ends_where_it_ends_without_drafts(plain: Reasoner, drafted: Reasoner) -> None:
    found = []
    for reasoner in (plain, drafted):
        run = reasoner.stream("x", sampling=Sampling(temperature=0, seed=0), limits=Limits(max_tokens=30))
        for step in run:
            if step.index == 4:
                run.stop()
            if step.index == 2:
                run.answer_now()
        found.append(run.trace())
    assert_same(found[1], found[0])
    assert found[0].finish_reason == "interrupted"


def test_a_drafter_that_cannot_be_is_refused_before_a_weight_is_read(
    folder: Path, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*arguments: Any, **more: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("qwq_mlx.generate.load_plan.load_model", unread)
    monkeypatch.setattr("qwq_mlx.generate.drafting.load_model", unread)
    other = write_tiny_checkpoint(tmp_path / "other", n_layers=1, **HEADS)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    renamed = dict(tokenizer["model"]["vocab"])
    first = sorted(renamed, key=renamed.__getitem__)[40:42]
    renamed[first[0]], renamed[first[1]] = renamed[first[1]], renamed[first[0]]
    tokenizer["model"]["vocab"] = renamed
    path.write_text(json.dumps(tokenizer))
    for draft, length, error, text in (
        (tmp_path / "missing", None, LoadError, "there is no such folder"),
        (other, 2, LoadError, f"first difference is id 40: '{first[1]}' in the draft model, '{first[0]}' in the model"),
        ("ngram", 0, OptionError, "draft_length is 0, expected a whole number from 1 to 15"),
        ("off", 3, OptionError, "draft_length is 3, but nothing is drafted"),
    ):
        with pytest.raises(error, match=text):
            load(folder, draft=draft, draft_length=length)
    with pytest.raises(LoadError, match=r"the draft model has [\d,]+ weights, the model only [\d,]+"):
        load(draft_folder, draft=folder)
    monkeypatch.setattr("qwq_mlx.generate.drafting.backend_name", lambda: "metal")
    with pytest.raises(OptionError, match="`reproducible` computes one row a pass on Metal"):
        load(folder, draft="ngram", reproducible=True)


def test_auto_takes_the_folder_that_the_environment_names(folder: Path, draft_folder: Path) -> None:
    target = open_model_folder(folder)
    named = choose_draft("auto", None, target, environment={"QWQ_MLX_DRAFT": str(draft_folder)})
    assert named.files is not None and named.files.path == draft_folder
    assert choose_draft("auto", None, target, environment={}).files is None
    assert not choose_draft(None, None, target).uses_texts
    assert not choose_draft("auto", None, target, environment={"QWQ_MLX_DRAFT": "off"}).uses_texts
    with pytest.raises(OptionError, match="draft is empty"):
        choose_draft("", None, target)


def test_the_plan_holds_the_draft_model(folder: Path, draft_folder: Path, plain: Reasoner) -> None:
    drafted = load(folder, draft=draft_folder, draft_length=2)
    without, beside = (reasoner.fit(Limits(context=256)).plan for reasoner in (plain, drafted))
    weights = sum(path.stat().st_size for path in draft_folder.glob("*.safetensors"))  # bfloat16; float32 in memory
    assert beside.peak_bytes - without.peak_bytes > 1.9 * weights
    assert "speculative" in beside.arithmetic()
    wide = drafted.batch_generate(["x"] * 3, sampling=Sampling(temperature=0), limits=Limits(max_tokens=4))
    assert len(wide) == 3


def test_the_draft_model_gives_back_the_cache_of_a_sample_that_has_ended(folder: Path, draft_folder: Path) -> None:
    drafted = load(folder, draft=draft_folder, draft_length=2)
    assert drafted.drafts is not None and drafted.drafts._model is not None
    held = []

    def progress(*_: object) -> None:
        assert drafted.drafts is not None and drafted.drafts._model is not None
        held.append(len(drafted.drafts._model._texts))

    sampling, limits = Sampling(temperature=0.9, seed=3), Limits(max_tokens=9)
    vote = drafted.vote("x", 5, width=1, sampling=sampling, limits=limits, stop_early=False, progress=progress)
    assert len(vote.traces) == len(held) == 5 and max(held) == 1


def test_a_reproducible_run_checks_no_drafts_where_rows_are_not_computed_alike(folder: Path) -> None:
    """In bfloat16 on the CPU, as on Metal, several rows round otherwise than one; a single run is no exception."""
    drafted = load(folder, draft="ngram", draft_length=3, compute_type="bfloat16", reproducible=True)
    run = drafted.stream("x x x x", sampling=Sampling(temperature=0), limits=Limits(max_tokens=30))
    assert len(list(run)) > 5
    assert drafted.drafts is not None and drafted.drafts.counts.n_passes == 0


def test_costs_are_measured_once_and_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured again where the file is damaged, or is of another model; and decide what is drafted."""
    linear = PassCosts(by_rows=(1.0, 2.0, 3.0), sync_s=0.1)
    n_measured = []

    def measured(*arguments: Any, **more: Any) -> list[CostsAt]:
        n_measured.append(more["most_rows"])
        return [CostsAt(context=300, costs=linear)]

    monkeypatch.setattr(drafting, "measure_costs", measured)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        reasoner = load(folder, draft="auto")
        assert reasoner.drafts is not None and reasoner.drafts.notes == ()
    assert n_measured == [7]  # on the CPU more rows would be computed otherwise
    reasoner.generate("x", sampling=Sampling(temperature=0), limits=Limits(max_tokens=60))
    assert reasoner.drafts.counts.drafted == {}
    [path] = tmp_path.rglob("*.json")
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "costs": []}))
    assert load(folder, draft="ngram").drafts is not None and n_measured == [7, 7]
    n_measured.pop()
    path.write_text(kept.replace("2.0", '"two"'))
    reasoner = load(folder, draft="ngram")
    assert len(n_measured) == 2 and reasoner.drafts is not None
    assert reasoner.drafts.notes[0].startswith(f"{path}: cannot be read (costs[0].costs.by_rows")
    load(folder, draft="ngram", limits=Limits(kv_bits=8))
    assert len(list(tmp_path.rglob("*.json"))) == 2
    monkeypatch.setattr(drafting, "cuda_kernels_run", lambda: True)
    load(folder, draft="ngram")
    assert len(list(tmp_path.rglob("*.json"))) == 3
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "400")
    load(folder, draft="ngram")
    assert len(list(tmp_path.rglob("*.json"))) == 4
    n_measured.clear()
    reasoner.model.module.ranks = SimpleNamespace(split=Split("pipeline", (1, 1)))  # two processes take another time
    for _ in range(2):
        drafting.make_speculator(reasoner.model, DraftChoice(uses_texts=True), limits=Limits())
    assert n_measured == [7]


def test_passes_are_timed_with_the_rows_they_have(folder: Path) -> None:
    """A clock that counts rows fed to the model: each pass costs what its rows do, so nothing beyond 3 is tried."""
    module, n_rows = load_model(folder).module, [0]

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def __call__(self, ids: Any, cache: Any) -> Any:
            n_rows[0] += ids.size
            return module(ids, cache=cache)

    costs = measure_costs(Counted(), n_ids=300, most_rows=7, clock=lambda: float(n_rows[0]))
    assert costs == [CostsAt(context=300, costs=PassCosts(by_rows=(1.0, 2.0, 3.0), sync_s=0.0))]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_passes_are_timed_with_few_ids_in_the_cache_and_with_many(folder: Path, kv_bits: int | None) -> None:
    """A clock by which a pass costs 1, and each of its rows what it attends to."""
    module, clock = load_model(folder).module, [0.0]

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def __call__(self, ids: Any, cache: Any) -> Any:
            clock[0] += 1.0 + ids.size * round(mx.max(mx.array(cache[0].offset)).item(), -2) / 10_000
            return module(ids, cache=cache)

    arguments: dict[str, Any] = {"n_ids": 300, "most_rows": 4, "kv_bits": kv_bits, "clock": lambda: clock[0]}
    [short, long] = measure_costs(Counted(), most_context=8_192, **arguments)
    assert (short.context, long.context) == (300, LONG_CONTEXT)
    for each, per_row in ((short, 0.03), (long, 0.41)):
        assert each.costs.by_rows == pytest.approx([1 + per_row * n for n in range(1, 5)], abs=1e-6)
    assert len(measure_costs(Counted(), most_context=LONG_CONTEXT, **arguments)) == 1


def test_the_command_says_what_was_drafted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "-p", "x", "--temp", "0", "--max-tokens", "40", "--no-save"]
    assert main(arguments) == 0
    plain = capsys.readouterr()
    assert main([*arguments, "--draft", "ngram", "--draft-length", "3"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out and "drafts:" not in plain.err
    assert "passes with drafts, ngram " in drafted.err.split("drafts: ")[1]
    assert main([*arguments, "--draft-length", "3"]) == 2
    assert "--draft-length is 3, but nothing is drafted. Give --draft too" in capsys.readouterr().err
