"""The doctor: each check sees a forged fault, a check that raises has failed, and the report names what failed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.convert import convert_checkpoint
from qwq_mlx.default_model import Choice, pocket_checkpoint
from qwq_mlx.doctor import __main__ as command
from qwq_mlx.doctor import attention, environment, memory, recorded, speed
from qwq_mlx.doctor.check import Check, Result, Subject, run_checks
from qwq_mlx.doctor.claims import CLAIMS, judge_claims
from qwq_mlx.errors import NotFiniteError
from qwq_mlx.model import attention as model_attention
from qwq_mlx.model import device
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.memory.activations import unpacked_bytes
from qwq_mlx.model.memory.plan import Workload, plan_memory

RECORDED = json.loads(recorded._FILE.read_text())


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The bundled model's conversion, made here, as it would be in the cache folder."""
    folder = tmp_path_factory.mktemp("pocket") / "4bit"
    convert_checkpoint(pocket_checkpoint(), folder, recipe="pocket-4bit", quality=False)
    return Subject("cpu", folder)


class Recorded:
    """Eight recorded ids of a model, and a file of them with changes."""

    def __init__(self, content: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = {**content, "ids": content["ids"][:8], "margins": content["margins"][:8]}
        self._path = path
        monkeypatch.setattr(recorded, "_FILE", path)
        self.write()

    def write(self, **changes: Any) -> None:
        self._path.write_text(json.dumps(self.content | changes))

    def ids_with_another_at(self, place: int) -> list[int]:
        ids = list(self.content["ids"])
        ids[place] += 1
        return ids


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Subject:
    """A model of which each pass takes a millisecond."""
    return Subject("cpu", tiny_checkpoint)


@pytest.fixture
def written(tiny: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setattr(recorded, "_N_IDS", 8)
    return Recorded(recorded.record(tiny.pocket), tmp_path / "recorded_ids.json", monkeypatch)


@pytest.mark.pocket
def test_the_recorded_ids_are_those_of_the_bundled_model(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorded(RECORDED, tmp_path / "recorded_ids.json", monkeypatch)
    result = recorded.check_recorded_ids(subject)
    assert (result.outcome, result.values["same"], result.values["differences"]) == ("ok", 8, [])


@pytest.mark.tiny
def test_a_wrong_id_is_a_failure_with_its_place_and_margin(tiny: Subject, written: Recorded) -> None:
    ids = written.ids_with_another_at(3)
    written.write(ids=ids)
    result = recorded.check_recorded_ids(tiny)
    assert result.outcome == "failed"
    assert f"at place 3 {ids[3] - 1} instead of {ids[3]}" in result.found
    assert result.values["differences"][0]["margin"] > recorded.NEAR_TIE["float32"]


@pytest.mark.tiny
def test_a_wrong_id_within_the_tolerance_is_a_near_tie_and_the_run_goes_on_behind_it(
    tiny: Subject, written: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last recorded id is what the model draws behind the exchanged one, not behind its own."""
    ids = written.ids_with_another_at(3)
    logits = recorded._logits(tiny.pocket, [*written.content["prompt_ids"], *ids[:7]])
    written.write(ids=[*ids[:7], mx.argmax(logits[-1]).item()], margins=[0.0] * 8)
    monkeypatch.setattr(recorded, "NEAR_TIE", {"float32": 1000.0})
    monkeypatch.setattr(recorded, "MARGIN_TOLERANCE", {"float32": 1000.0})
    result = recorded.check_recorded_ids(tiny)
    assert result.outcome == "ok"
    assert "(near-ties)" in result.found
    assert 7 not in [each["place"] for each in result.values["differences"]]


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"margins": [1000.0] * 8}, "8 of 8 ids are the recorded ones, their margins within 99"),
        ({"prompt_ids": [1, 2]}, "the prompt became"),
    ],
)
def test_other_logits_or_another_prompt_fail(
    tiny: Subject, written: Recorded, changes: dict[str, Any], text: str
) -> None:
    written.write(**changes)
    result = recorded.check_recorded_ids(tiny)
    assert result.outcome == "failed"
    assert text in result.found


def test_the_attention_agrees_with_numpy(subject: Subject) -> None:
    result = attention.check_attention(subject)
    assert result.outcome == "ok", result.found
    assert len(result.values["errors"]) == 9


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_quantized_attention_that_is_off_by_a_hundredth_or_nan_fails(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    attend = model_attention._attend
    monkeypatch.setattr(model_attention, "_attend", lambda *arguments: attend(*arguments) * factor)
    result = attention.check_attention(subject)
    assert result.outcome == "failed"
    assert "cache of 8 bits" in result.found
    assert "cache of all bits" not in result.found


def test_a_plain_attention_with_another_rotation_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    config = attention._config
    monkeypatch.setattr(
        attention,
        "build_module",
        lambda config, packed, build=attention.build_module: build(replace(config, rope_theta=20_000.0), packed),
    )
    assert config(attention._SHAPES[0]).rope_theta == 10_000.0
    result = attention.check_attention(subject)
    assert result.outcome == "failed"
    assert "cache of all bits" in result.found


def test_quantized_caches_that_a_backend_does_not_offer_or_that_take_too_long_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Subject("cuda", pocket_checkpoint())
    result = attention.check_attention(cuda)
    assert result.values["left_out"] == [
        f"4 heads on 2, 64 wide, cache of {bits} bits: not offered on cuda" for bits in (8, 4)
    ]
    monkeypatch.setattr(attention, "_BUDGET_S", -1)
    late = attention.check_attention(cuda)
    assert (late.outcome, len(late.values["errors"]), len(late.values["left_out"])) == ("ok", 3, 6)
    assert "left out 6" in late.found and "no time" in late.found


@pytest.mark.tiny
def test_a_plan_is_held_against_the_peak_and_one_that_is_off_fails(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CONTEXT", 256)
    monkeypatch.setattr(memory, "BOUNDS", (0.8, 1.25))  # in so small a model one buffer more or less is a tenth
    result = memory.check_memory_plan(tiny)
    assert result.outcome == "ok", result.found
    plan_memory = memory.plan_memory

    def doubled(*arguments: Any, **settings: Any) -> Any:
        plan = plan_memory(*arguments, **settings)
        return replace(plan, weights_bytes=plan.weights_bytes + plan.peak_bytes)

    monkeypatch.setattr(memory, "plan_memory", doubled)
    off = memory.check_memory_plan(tiny)
    assert off.outcome == "failed"
    assert off.values["planned/measured"]["cache of all bits"] > 1.8


@pytest.mark.tiny
def test_on_cuda_a_small_model_may_hold_the_unpacked_matrices_of_two_layers(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Subject("cuda", tiny.pocket_folder)
    files = open_model_folder(tiny.pocket_folder)
    plan = plan_memory(files, Workload(context=512, prefill_step=128), backend="cuda")
    layer = unpacked_bytes(files.config, 2)
    for held, outcome in ((plan.peak_bytes + layer, "ok"), (plan.peak_bytes + 3 * layer, "failed")):
        monkeypatch.setattr(memory, "measured_peak", lambda *_, held=held: held)
        assert memory.check_memory_plan(cuda).outcome == outcome
    monkeypatch.setattr(memory, "measured_peak", lambda *_: plan.peak_bytes // 2)
    assert memory.check_memory_plan(cuda).outcome == "failed", "too much is never planned"


class FakeMetal:
    """mlx.core of a Mac; `keeps` is whether a limit that is put back stays there."""

    cpu = "cpu"
    metal = SimpleNamespace(is_available=lambda: True)

    def __init__(self, working_set: int) -> None:
        self.info = {"max_recommended_working_set_size": working_set}
        self.limit = 7

    def default_device(self) -> SimpleNamespace:
        return SimpleNamespace(type="gpu")

    def device_info(self) -> dict[str, int]:
        return self.info

    def set_wired_limit(self, n_bytes: int) -> int:
        before, self.limit = self.limit, n_bytes
        return before

    def synchronize(self) -> None:
        pass


@pytest.fixture
def on_metal(monkeypatch: pytest.MonkeyPatch) -> FakeMetal:
    physical = 36 << 30
    fake = FakeMetal(physical * 3 // 4)
    for module in (device, environment):
        monkeypatch.setattr(module, "import_mlx", lambda: fake)
    monkeypatch.setattr(environment, "_physical_bytes", lambda: physical)
    return fake


def test_on_metal_the_wired_limit_is_set_inside_and_put_back(on_metal: FakeMetal) -> None:
    metal = Subject("metal", Path())
    assert environment.check_wired_limit(metal).outcome == "ok"
    assert on_metal.limit == 7


def test_a_wired_limit_that_does_not_hold_fails(on_metal: FakeMetal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_metal, "set_wired_limit", lambda n_bytes: 7)
    result = environment.check_wired_limit(Subject("metal", Path()))
    assert result.outcome == "failed"
    assert "7 inside" in result.found


def test_the_working_set_is_held_against_the_assumed_one(on_metal: FakeMetal) -> None:
    metal = Subject("metal", Path())
    assert environment.check_working_set(metal).outcome == "ok"
    on_metal.info["max_recommended_working_set_size"] //= 2
    result = environment.check_working_set(metal)
    assert result.outcome == "failed"
    assert "14.5 GB on a Mac of 36 GiB" in result.found


def test_off_metal_there_is_neither(subject: Subject) -> None:
    for check in (environment.check_wired_limit, environment.check_working_set):
        assert check(subject).outcome == "not checkable"


def test_a_package_that_is_missing_or_too_old_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_versions(subject).outcome == "ok"
    versions = {"mlx": "0.9.12", "numpy": "none"}
    monkeypatch.setattr(environment, "package_version", lambda name: versions.get(name, "99.0"))
    result = environment.check_versions(subject)
    assert result.outcome == "failed"
    assert result.expected.startswith("mlx at least 0.") and "numpy at least 1.26" in result.expected


def test_an_installed_package_is_not_needed_for_the_versions(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "requires", missing)
    assert environment.check_versions(subject).outcome == "not checkable"


def test_a_model_folder_is_planned_from_its_headers(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = Subject("cpu", Path(), tiny_checkpoint)
    assert environment.check_model_folder(named).outcome == "ok"
    monkeypatch.setattr(environment, "limit_bytes", lambda: 1000)
    result = environment.check_model_folder(named)
    assert result.outcome == "failed"
    assert "largest context 0" in result.found


def test_the_machine_computes_and_has_memory(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.check_backend(subject).outcome == "ok"
    assert environment.check_memory(subject).outcome == "ok"
    monkeypatch.setattr(environment, "available_bytes", lambda: 1 << 60)
    assert environment.check_memory(subject).outcome == "failed"


@pytest.mark.tiny
def test_a_row_that_fails_while_costs_are_measured_is_named(tiny: Subject) -> None:
    result = speed._step_seconds(tiny, 2)
    assert result > 0
    weight = tiny.pocket.module.model.norm.weight
    tiny.pocket.module.model.norm.weight = weight * float("nan")
    with pytest.raises(NotFiniteError):
        speed._step_seconds(tiny, 2)


def test_a_check_that_raises_has_failed_and_the_next_one_runs(subject: Subject) -> None:
    def broken(_: Subject) -> Result:
        raise RuntimeError("[metal] no such kernel")

    told: list[str] = []
    results = run_checks(
        [Check("first", broken), Check("second", lambda _: Result(outcome="ok", found="fine"))], subject, told.append
    )
    assert [(each.name, each.outcome) for each in results] == [("first", "failed"), ("second", "ok")]
    assert results[0].found == "RuntimeError: [metal] no such kernel"
    assert told == ["first", "second"]


def test_a_report_has_only_numbers_that_json_has() -> None:
    result = Result(outcome="failed", found="", values={1: [float("nan"), (float("inf"), 2.0)]})
    assert result.as_json()["values"] == {"1": ["nan", ["inf", 2.0]]}


def test_every_place_that_says_it_is_not_measured_on_metal_is_a_claim(repository: Path) -> None:
    paths = [
        path
        for path in (repository / "README.md", *repository.glob("docs/*.md"), *repository.glob("qwq_mlx/**/*.py"))
        if not path.is_relative_to(repository / "qwq_mlx" / "doctor")
    ]
    said = {
        path.relative_to(repository).as_posix()
        for path in paths
        if "measured on metal" in " ".join(path.read_text(encoding="utf-8").lower().split())
    }
    assert said == {file for claim in CLAIMS for file in claim.files}


def test_a_claim_has_the_outcome_of_its_worst_check_on_metal_and_none_elsewhere() -> None:
    results = [Result(name=check.name, outcome="ok", found="") for check in command._checks()]
    results = [replace(each, outcome="failed") if each.name == "attention" else each for each in results]
    outcomes = [each.outcome for each in judge_claims("metal", results)]
    assert outcomes.count("failed") == 1
    assert outcomes.count("ok") == sum(bool(claim.checks) for claim in CLAIMS) - 1
    assert all(bool(claim.checks) != bool(claim.reason) for claim in CLAIMS)
    assert {each.outcome for each in judge_claims("cuda", results)} == {"not checkable"}


@pytest.fixture
def two_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Result]:
    """The command with every check replaced by one that says what stands here."""
    from qwq_mlx import default_model

    monkeypatch.setattr(default_model, "pocket_model", lambda: Choice(folder=tmp_path))
    says = {"attention": Result(outcome="ok", found="as numpy")}
    names = [check.name for check in command._checks()]
    checks = [Check(name, lambda _, name=name: says.get(name, Result(outcome="ok", found="fine"))) for name in names]
    monkeypatch.setattr(command, "_checks", lambda: checks)
    return says


def test_nothing_failed_exits_with_0(two_checks: dict[str, Result], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    out, err = capsys.readouterr()
    assert "ok             attention: as numpy\n" in out
    assert out.endswith("\nnothing failed\n")
    assert "checking: attention\n" in err


def test_a_failure_exits_with_1_and_its_line(two_checks: dict[str, Result], capsys: pytest.CaptureFixture[str]) -> None:
    two_checks["attention"] = Result(outcome="failed", found="off by 0.3", expected="at most 0.01")
    assert command.main(["--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "failed         attention: off by 0.3 (expected: at most 0.01)\n" in out
    assert err == "failed: attention: found off by 0.3; expected at most 0.01\n"


def test_the_report_is_one_json_object(two_checks: dict[str, Result], capsys: pytest.CaptureFixture[str]) -> None:
    two_checks["attention"] = Result(outcome="failed", found="off", values={"error": float("nan")})
    assert command.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["failed"]) == (1, ["attention"])
    assert len(report["checks"]) == len(command._checks())
    assert len(report["claims"]) == len(CLAIMS)
    assert {"name", "outcome", "found", "expected", "values"} == set(report["checks"][0])


def test_without_mlx_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwq_mlx.errors import BackendError
    from qwq_mlx.model import upstream

    def missing() -> Any:
        raise BackendError("MLX cannot start on this machine. pip install mlx")

    monkeypatch.setattr(upstream, "import_mlx", missing)
    assert command.main([]) == 1
    assert capsys.readouterr().err == "error: MLX cannot start on this machine. pip install mlx\n"
