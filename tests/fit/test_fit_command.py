"""The fit command: the arithmetic, the cheapest change, and a table of Macs, all from headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import write_tiny_checkpoint

from qwq_mlx.facts import QWQ_32B_PREVIEW
from qwq_mlx.fit import __main__ as command
from qwq_mlx.fit.speed import link_text, parse_link
from qwq_mlx.model.link_speed import LinkSpeed, measure_link
from qwq_mlx.model.memory.advice import MACS_GIB, cheapest_change, table_of_macs
from qwq_mlx.model.memory.plan import RESERVE_BYTES, Workload, metal_limit_bytes, plan_memory, shape_of_facts
from qwq_mlx.model.memory.splits import plan_ranks
from qwq_mlx.model.split import Split

QWQ = shape_of_facts(QWQ_32B_PREVIEW)
GIB = 1 << 30


def test_what_fits_needs_no_change() -> None:
    assert cheapest_change(QWQ, plan_memory(QWQ, limit_bytes=64 * GIB)) is None


def test_weights_above_the_limit_have_no_change_that_helps() -> None:
    plan = plan_memory(QWQ, limit_bytes=metal_limit_bytes(24 * GIB))
    assert plan.largest_context == 0
    assert cheapest_change(QWQ, plan) is None


@pytest.mark.parametrize("missing_bytes", [1, 400_000_000, 4_000_000_000, 6_000_000_000, 8_500_000_000])
def test_a_change_fits_and_every_cheaper_one_does_not(missing_bytes: int) -> None:
    plan = plan_memory(QWQ)
    plan = plan_memory(QWQ, limit_bytes=plan.peak_bytes + RESERVE_BYTES - missing_bytes)
    change = cheapest_change(QWQ, plan)
    assert change is not None
    assert change.plan.fits
    cheaper = [Workload(prefill_step=256), Workload(prefill_step=256, kv_bits=8), Workload(prefill_step=256, kv_bits=4)]
    place = cheaper.index(change.plan.workload) if change.plan.workload in cheaper else len(cheaper)
    assert not any(plan_memory(QWQ, each, limit_bytes=plan.limit_bytes).fits for each in cheaper[:place])


def test_the_changes_are_named() -> None:
    peak = plan_memory(QWQ).peak_bytes + RESERVE_BYTES

    def text(missing_bytes: int, **asked: int) -> str:
        change = cheapest_change(QWQ, plan_memory(QWQ, Workload(**asked), limit_bytes=peak - missing_bytes))
        return change.text if change else ""

    assert text(1) == "prefill passes of 256 ids"
    assert text(2_000_000_000) == "8-bit cache, prefill passes of 256 ids"
    assert text(8_900_000_000).startswith("a context of ")
    assert text(8_900_000_000, prefill_step=64, kv_bits=4).startswith("a context of ")


def test_a_batch_is_advised_as_one_sequence_is() -> None:
    plan = plan_memory(QWQ, Workload(n_sequences=4))
    change = cheapest_change(QWQ, plan_memory(QWQ, plan.workload, limit_bytes=plan.peak_bytes - 1))
    assert change is not None
    assert change.plan.fits and change.plan.workload.n_sequences == 4


def test_the_table_has_every_mac_and_grows() -> None:
    table = table_of_macs(QWQ, Workload(), reserve_bytes=RESERVE_BYTES)
    assert [gib for gib, _ in table] == list(MACS_GIB)
    contexts = [plan.largest_context for _, plan in table]
    assert contexts == sorted(contexts)
    assert contexts[0] == 0
    assert contexts[-1] == 32_768


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_text_shows_the_arithmetic_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--ram", "32")
    assert (code, err) == (0, "")
    largest = plan_memory(shape_of_facts(QWQ_32B_PREVIEW), limit_bytes=metal_limit_bytes(32 << 30)).largest_context
    for text in (
        "QwQ-32B-Preview, 4-bit weights, group 64",
        "does not fit, metal",
        "\nwhat binds: weights\n",
        f"largest context that fits: {largest:,}",
        "the least that would fit: 4-bit cache",
        "512 GiB",
    ):
        assert text in out
    assert "the least that would fit: nothing; take fewer bits or more memory" in run(capsys, "--ram", "16")[1]


def test_a_plan_of_mlx_lms_own_work_says_what_keeps_it_to_that_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--ram", "64", "--context", "4096")
    assert "mlx-lm" not in run(capsys, *flags, "--samples", "4")[1]
    assert "mlx-lm" not in run(capsys, *flags)[1]


def test_every_flag_reaches_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = write_tiny_checkpoint(tmp_path, n_heads=2, n_kv_heads=1)  # heads that can be quantized, 64 wide
    flags = ["--ram", "32", "--context", "4096", "--prefill-step", "128", "--reserve", "2", "--json"]
    drafted = ["--kv-bits", "8", "--compute-type", "float32", "--draft", str(draft), "--draft-tokens", "7"]
    code, out, _ = run(capsys, *flags, *drafted)
    found = json.loads(out)
    assert code == 0
    assert found["workload"] == {
        **{"context": 4096, "kv_bits": 8, "n_sequences": 1, "n_shared": 0, "prefill_step": 128},
        **{"compute_type": "float32", "draft": str(draft), "drafts_from_texts": False, "n_draft": 7},
        **{"split": None, "rank": 0},
    }
    assert found["reserve_bytes"] == 2_000_000_000
    assert found["speculative_bytes"] > 0 == found["batch_bytes"]
    assert found["limit_bytes"] == metal_limit_bytes(32 * GIB)
    assert (found["context"], found["backend"]) == (4096, "metal")
    batched = json.loads(run(capsys, *flags, "--samples", "3")[1])
    assert batched["workload"]["n_sequences"] == 3
    assert batched["batch_bytes"] > 0 == batched["speculative_bytes"]


def test_a_recipe_is_planned_without_a_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    """The size is that of the recipes' table in docs, and the recipe whose packing is the default's is its plan."""
    two_bits = json.loads(run(capsys, "--ram", "24", "--recipe", "2bit-g32", "--json")[1])
    assert two_bits["model"] == "QwQ-32B-Preview, recipe 2bit-g32"
    assert round(two_bits["weights_bytes"] / 1e9, 1) == 12.3
    four_bits = json.loads(run(capsys, "--ram", "32", "--recipe", "4bit", "--json")[1])
    assert four_bits == {**json.loads(run(capsys, "--ram", "32", "--json")[1]), "model": four_bits["model"]}


def test_a_folder_is_planned_from_its_headers_on_this_machine(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--model", str(tiny_checkpoint), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["model"] == str(tiny_checkpoint)
    assert found["fits"]
    assert found["change"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--ram", "-1"], 2, "--ram is -1.0, expected a number from 0 to 1,000,000"),
        (["--reserve", "nan"], 2, "--reserve is nan, expected a number from 0 to 1,000,000"),
        (["--ram", "32", "--link", "60us,4GB/s"], 2, "--link needs --hosts"),
        (["--ram", "32", "--kv-bits", "5"], 2, "--kv-bits is 5, expected None, 8 or 4"),
        (["--ram", "32", "--context", "40000"], 2, "--context is 40,000, expected at most 32,768"),
        (["--ram", "32", "--model", "/nowhere"], 1, "/nowhere: there is no such folder"),
    ],
)
def test_wrong_use_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"error: {text}")
    assert "Traceback" not in err


def in_process(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def test_a_plan_needs_nothing_that_only_posix_has(tiny_checkpoint: Path) -> None:
    """Who looks for the right Mac may have Windows: Python has no fcntl there, and os none of these."""
    script = (
        "import os, sys\n"
        "for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('O_NONBLOCK', 'O_CLOEXEC', 'O_DIRECTORY', 'O_NOFOLLOW', 'pread', 'preadv', 'sysconf'):\n"
        "    os.__dict__.pop(name, None)\n"
        "from qwq_mlx.fit.__main__ import main\n"
        f"main(['--ram', '32', '--model', {str(tiny_checkpoint)!r}])\n"
    )
    assert in_process(script) == in_process(
        f"from qwq_mlx.fit.__main__ import main\nmain(['--ram', '32', '--model', {str(tiny_checkpoint)!r}])\n"
    )


def test_with_ram_given_mlx_is_not_imported() -> None:
    script = (
        "import sys\n"
        "from qwq_mlx.fit.__main__ import main\n"
        "main(['--ram', '32'])\n"
        "print(sorted({'mlx', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    assert in_process(script).endswith("\n[]\n")


def test_two_small_macs_hold_what_neither_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--hosts", "a=16,b=24", "--context", "8192", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    tensor, pipeline = answer["splits"]
    halves, stages = tensor["hosts"], pipeline["hosts"]
    assert not plan_memory(QWQ, limit_bytes=metal_limit_bytes(24 * GIB)).fits and answer["alone_token_s"] == {}
    output_bytes = 152_064 * 5_120 // 2 + 152_064 * 5_120 // 64 * 4
    assert halves["a"]["weights_bytes"] == halves["b"]["weights_bytes"] + output_bytes, "the first one draws"
    assert halves["a"]["kv_bytes"] * 2 == plan_memory(QWQ, Workload(context=8192)).kv_bytes
    assert not halves["a"]["fits"], "half of it is too much for the smaller one"
    assert stages["a"]["fits"] and stages["b"]["fits"]
    n_layers = pipeline["split"]["n_layers"]
    assert sum(n_layers) == 64 and n_layers[0] < n_layers[1]
    whole = plan_memory(QWQ).weights_bytes
    assert stages["a"]["weights_bytes"] + stages["b"]["weights_bytes"] == whole
    shares = [stages[name]["peak_bytes"] / (stages[name]["limit_bytes"] - 500_000_000) for name in "ab"]
    assert abs(shares[0] - shares[1]) < 0.05, "each is as full as the other"


def test_the_split_reaches_the_longest_context_that_any_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--hosts", "a=16,b=24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["splits"][1]
    limits = [metal_limit_bytes(gib * GIB) for gib in (16, 24)]
    best = max(
        min(each.largest_context for each in plan_ranks(QWQ, Workload(), Split("pipeline", (n, 64 - n)), limits))
        for n in range(20, 32)
    )
    assert min(each["largest_context"] for each in found["hosts"].values()) == best


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("a=16,b=24", "none of these fits at 32,768 positions; a pipeline does with --context 30464"),
        ("a=16,b=24,c=16", "tensor parallel is not possible: its 40 attention heads are no multiple of 3"),
        ("a=24,b=24 --context 8192", "where a sum of 10 kB takes less than 691 us; --measure-link"),
        ("a=24,b=24 --context 8192 --link 60us,4GB/s", "tensor parallel is the fastest"),
        ("a=24,b=24 --context 8192 --link 800us,4GB/s", "a pipeline is the fastest"),
        ("a=64,b=24 --context 8192 --link 2000us,4GB/s", "a alone is the fastest at this context"),
        ("a=64@400,b=24 --context 8192 --link 60us,4GB/s", "a alone is the fastest at this context"),
        ("a=8,b=8", "none of these fits, whatever the context"),
        ("a=1,b=64 --context 8192", "b alone holds the model at this context"),
        ("a=24@400,b=20@30 --context 8192", "a pipeline is faster than tensor parallel, whatever the link"),
        ("a=24,b=24 --context 8192", "tensor parallel 92 ms, pipeline 180 ms"),  # 9.65 and 18.43 less 0.44 GB
    ],
)
def test_which_way_is_faster_is_told_by_the_link(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--hosts", *arguments.split()]) == 0
    assert said in capsys.readouterr().out


def test_a_link_is_measured_and_read_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    link = measure_link(mx.distributed.init(), seconds=0.02)
    assert 0 < link.latency_s < link.seconds(100_000_000)
    again = parse_link(link_text(LinkSpeed(latency_s=52.3e-6, bytes_per_s=3.1e9)))
    assert again == LinkSpeed(latency_s=52e-6, bytes_per_s=3.1e9) and again.seconds(10_240) == again.latency_s
    assert again.seconds(10_240 + int(again.bytes_per_s)) == pytest.approx(again.latency_s + 1)
    assert command.main(["--measure-link"]) == 2
    assert "--measure-link needs several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("a=16,b", "expected NAME=GIB"),
        ("a=16,a=24", "names a twice"),
        ("a=16,b=0", "expected NAME=GIB"),
        ("a=16,b=16@x", "expected NAME=GIB or NAME=GIB@GB/s"),
        ("a=16,b=16 --link 5ms", "expected MICROSECONDSus,RATEGB/s"),
        ("a=16", "names one Mac, expected several. Plan one by --ram 16"),
    ],
)
def test_macs_that_cannot_hold_it_together_are_named(
    hosts: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--hosts", *hosts.split()]) == 2
    assert message in capsys.readouterr().err
