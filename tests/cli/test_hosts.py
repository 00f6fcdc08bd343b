"""--hosts: what is wrong is told before anything starts, who fails is named, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.cli.follow import __main__ as follow_main
from qwq_mlx.cli.host_check import _interpreters, checked_hosts
from qwq_mlx.cli.hosts import Hosts, parse_hosts, read_hostfile, without_flags
from qwq_mlx.cli.launch import Launch
from qwq_mlx.cli.processes import stopped_pids
from qwq_mlx.cli.rank import PAUSED
from qwq_mlx.cli.watch import FIRST_STUCK_S, SILENT_S, START_S, STUCK_S, SWAPPING_S, Watch
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import LoadError, OptionError, RankError
from qwq_mlx.generate.__main__ import main
from qwq_mlx.generate.checkpoint.file import read_state_value
from qwq_mlx.generate.stream import Stream

QUESTION = "What is 3 + 4?"
POCKET = pocket_checkpoint()


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("a.local,b.local", r"begins with a\.local, expected this machine"),
        ("localhost,localhost", "twice"),
        ("localhost,127.0.0.1", "twice, as localhost"),
        ("localhost,b.local,b.local", "names b.local twice"),
        ("localhost", "asks for 1 process, expected 2 to 64"),
        ("localhost,", "expected names with commas between them"),
        ("localhost,-oProxyCommand=x", "expected names with commas between them"),
        ("localhost*0", "expected a number from 1 to 64"),
        ("localhost*" + "9" * 5000, "expected a number from 1 to 64"),
        ("localhost*two", "expected a number from 1 to 64"),
        ("localhost*60,b*5", "asks for 65 processes"),
    ],
)
def test_hosts_that_cannot_be_are_named(hosts: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_hosts(hosts)


def test_a_hostfile_of_mlx_gives_addresses_devices_and_variables(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    value: dict[str, Any] = {
        "backend": "jaccl",
        "envs": ["MLX_METAL_FAST_SYNCH=1"],
        "hosts": [
            {"ssh": "localhost", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]},
            {"ssh": "b.local", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None]},
        ],
    }
    path.write_text(json.dumps(value))
    hosts = read_hostfile(path)
    assert [host.ssh for host in hosts.ranks] == [None, "b.local"]
    setup = Hosts(**{**_fields(hosts), "ports": ((7000,), (7001,))}).setup(1, signs=1, snapshots="")
    assert (setup.backend, setup.addresses) == ("jaccl", [["10.0.0.1:7000"], ["10.0.0.2:7001"]])
    assert (setup.rdma[1], setup.environment) == (["rdma_en2", None], {"MLX_METAL_FAST_SYNCH": "1"})
    for damage, message in (
        ({"hosts": [{"ssh": "localhost"}, {"ssh": "b"}]}, "is no hostfile"),
        ({"hosts": value["hosts"][:1], "backend": "ring"}, "asks for 1 process"),
        ({"backend": "carrier pigeon"}, "asks for the backend 'carrier pigeon'"),
        ({"hosts": [{**each, "rdma": []} for each in value["hosts"]]}, "does not name a device for each of 2 hosts"),
    ):
        path.write_text(json.dumps({**value, **damage}))
        with pytest.raises(OptionError, match=message):
            read_hostfile(path)


def _fields(hosts: Hosts) -> dict[str, Any]:
    return {"ranks": hosts.ranks, "backend": hosts.backend, "environment": hosts.environment}


def test_rank_0_gets_the_other_arguments() -> None:
    asked = ["-p", "--hosts", "--temp", "0", "--hosts=localhost*2", "--prompt", "x", "--json"]
    assert without_flags(asked, {"--hosts", "-p", "--prompt"}) == ["--temp", "0", "--json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--hosts", "localhost*9"], 2, "--hosts has 9 processes, expected at most 8, the layers of"),
        (["--hosts", "localhost*2", "--hostfile", "x"], 2, "--hosts and --hostfile exclude each other"),
        (["--hosts-port", "7000"], 2, "--hosts-port needs --hosts or --hostfile"),
        (["--hosts", "localhost*2", "--hosts-backend", "jaccl"], 2, "needs --hostfile"),
        (["--hosts-split", "pipeline"], 2, "--hosts-split needs --hosts or --hostfile"),
        (
            ["--hosts", "localhost*3", "--hosts-split", "tensor"],
            2,
            "3 processes cannot hold this model tensor parallel",
        ),
        (["--hostfile", "no-such-file"], 1, "no-such-file"),
    ],
)
def test_what_cannot_be_is_refused_before_a_process_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["--model", str(POCKET), "-p", "hi", *arguments]) == code
    assert message in capsys.readouterr().err


_SSH = """#!/bin/sh
# ssh's stand-in: the last two arguments are a host and a command, which runs here as another machine
for word; do host=$command; command=$word; done
case $host in
  asleep) echo "ssh: connect to host asleep port 22: Operation timed out" >&2; exit 255;;
  other) echo "{}"; exit;;
  denied) echo "PermissionError: config.json" >&2; exit 1;;
  bare) command="$(echo "$command" | sed s/import/no/)";;
  twin) ;;
  quiet) unset SSH_CONNECTION;;
  *) export QWQ_MLX_MACHINE=$host;;
esac
[ $host = quiet ] && export QWQ_MLX_MACHINE=q || export SSH_CONNECTION="127.0.0.1 50000 127.0.0.1 22"
[ $host = old ] && command="$(echo "$command" | sed 's/-m qwq_mlx.cli.host_report/old_report.py/')"
cd "$(dirname "$0")" && exec sh -c "$command"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in ssh's place that runs here what it is told, in other folders and with other names."""
    path = tmp_path / "ssh"
    path.write_text(_SSH)
    path.chmod(0o755)
    (tmp_path / "old_report.py").write_text(
        "import json, sys\nfrom qwq_mlx.cli.host_report import report\n"
        "found = report(json.loads(sys.stdin.readline()))\n"
        "found['versions']['mlx'] = '0.1'\nfound['models'][0]['identity'] = 'other'\nprint(json.dumps(found))\n"
    )
    monkeypatch.setenv("QWQ_MLX_SSH", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return path


@pytest.mark.parametrize(
    ("host", "messages"),
    [
        ("asleep", ["asleep: does not answer `ssh asleep` without a password: ssh: connect", "timed out"]),
        ("bare", ["bare: has no python with qwq_mlx"]),
        ("other", ["other: answers with '{}", "Is another qwq_mlx installed there?"]),
        ("denied", ["denied: cannot say what it has: PermissionError"]),
        ("old", ["old: has other versions", "mlx 0.1, here", "holds another model than"]),
        ("twin", ["twin: is the same machine as localhost. Name it once, as localhost*2."]),
        ("quiet", ["quiet: its sshd does not say which addresses it uses"]),
    ],
)
def test_every_fault_of_another_machine_is_named_before_a_process_starts(
    ssh: Path, host: str, messages: list[str]
) -> None:
    with pytest.raises(LoadError) as caught:
        checked_hosts(parse_hosts(f"localhost,{host}"), [POCKET], port=None)
    for message in [*messages, "Nothing was started."]:
        assert message in str(caught.value)


def test_an_interpreter_in_a_folder_with_a_space_is_one_word_of_the_other_machine_s_shell() -> None:
    choice = " ".join(_interpreters(Path("/home/me/my $work/python"), Path("/home/me")))
    script = f'for p in {choice}; do echo "$p"; done'
    done = subprocess.run(["sh", "-c", script], env={"HOME": "/Users/ben"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["/home/me/my $work/python", "/Users/ben/my $work/python", "python3"]


def test_a_missing_folder_and_a_taken_port_are_named(
    ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(LoadError) as caught:
        port = taken.getsockname()[1]
        checked_hosts(parse_hosts("localhost*2"), [POCKET], port=port)
    assert f"localhost: port {port} is taken. Give another --hosts-port" in str(caught.value)
    model = Path(os.path.relpath(POCKET))
    monkeypatch.setattr("qwq_mlx.cli.host_check.possible_folders", lambda folder: ["/nowhere/model", "~/nowhere"])
    with pytest.raises(LoadError, match=r"b\.local: has no folder /nowhere/model or ~/nowhere"):
        checked_hosts(parse_hosts("localhost,b.local"), [model], port=None)


def _hosts(text: str = "localhost*2") -> Hosts:
    return checked_hosts(parse_hosts(text), [POCKET], port=None)


def _with_stdout(path: Path, work: Callable[[], int]) -> int:
    """Call with this process's stdout, which rank 0 inherits, in a file."""
    before = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            return work()
        finally:
            os.dup2(before, 1)
            os.close(before)


def test_a_process_that_is_killed_on_another_machine_is_named_the_run_kept_and_nothing_left(
    ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over ssh's stand-in; what was written is then the beginning of what one process writes."""
    monkeypatch.chdir(tmp_path)
    launches: list[Launch] = []
    pids: list[int | None] = []

    class Watched(Launch):
        def work(self) -> int:
            launches.append(self)
            return super().work()

    def kill() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not (launches and launches[0].snapshots.exists()):
            time.sleep(0.05)
        pids.extend(launches[0]._watch.pid(rank) for rank in range(2))
        assert pids[1] is not None
        os.kill(pids[1], signal.SIGKILL)

    monkeypatch.setattr("qwq_mlx.cli.on_hosts.Launch", Watched)
    thread = threading.Thread(target=kill)
    thread.start()
    arguments = ["--model", str(POCKET), "-p", "Count.", "--temp", "0", "--on-loop", "off", "--max-tokens", "3000"]
    code = main([*arguments, "--hosts", "localhost,b.local", "--save", "kept.qwq", "--quiet"])
    thread.join()
    written = capfd.readouterr()
    assert code == 6 and "error: process 1 of 2 (b.local, pid " in written.err
    assert "saved: " in written.err and "go on with --resume kept.qwq" in written.err
    assert all(process.poll() is not None for process in launches[0].processes)
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    saved = len(read_state_value(Path("kept.qwq"))["steps"])
    assert saved >= 1
    assert main(["--model", str(POCKET), "--resume", "kept.qwq", "--max-tokens", str(saved + 3), "--quiet"]) == 0
    again = capfd.readouterr().out
    assert main([*arguments[:-1], str(saved + 3), "--quiet", "--no-save"]) == 0
    alone = capfd.readouterr().out
    assert again and alone.endswith(again) and alone.startswith(alone.removesuffix(again)[:1])


@pytest.mark.parametrize("is_full", [False, True])
def test_a_run_that_is_over_leaves_nothing_to_save_and_one_that_cannot_be_kept_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_full: bool
) -> None:
    """Else a process that fails at the end lets an older state take the place of what --save wrote."""
    kept, saved = tmp_path / ("gone" if is_full else "") / "run.json", tmp_path / "saved.qwq"
    was_there: list[bool] = []
    save = Stream.save
    monkeypatch.setattr("qwq_mlx.generate.__main__.snapshot_path", lambda: kept)
    monkeypatch.setattr(Stream, "save", lambda *of: (was_there.append(kept.exists()), save(*of)))
    assert main(["--model", str(POCKET), "-p", "Count.", "--max-tokens", "2", "--save", str(saved), "--quiet"]) == 0
    assert was_there == [not is_full] and not kept.exists() and saved.exists()
    assert ("run.json: cannot be written (No such file" in capsys.readouterr().err) is is_full


def test_rank_0_joins_the_others_before_it_reads_what_may_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give up connecting long before somebody has typed a question into a pipe."""
    order: list[str] = []
    monkeypatch.setattr("qwq_mlx.cli.on_hosts.joined_group", lambda: order.append("joined"))
    monkeypatch.setattr("qwq_mlx.generate.__main__.read_stdin", lambda stdin: order.append("read") or " ")
    assert main(["--model", str(POCKET), "-p", "-"]) == 2
    assert order == ["joined", "read"]


def test_a_run_that_a_last_ctrl_c_ended_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 waited inside MLX, and what it had written is all there is."""

    def work(launch: Launch) -> int:
        launch.snapshots.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(Launch, "work", work)
    monkeypatch.setattr("qwq_mlx.generate.checkpoint.snapshot.save_snapshot", lambda snapshot, path: 7)
    arguments = ["--model", str(POCKET), "-p", "Count.", "--hosts", "localhost*2", "--quiet"]
    assert main([*arguments, "--save", str(tmp_path / "kept.qwq")]) == 130
    assert "saved: 7 tokens; go on with --resume" in capsys.readouterr().err


class _Ended:
    """A process as `Launch` sees it, that has ended."""

    stdin = None

    def __init__(self, code: int) -> None:
        self.pid, self.returncode = 0, code

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ((1, -9), r"process 1 of 2 .* was ended by signal 9"),
        ((-11, -9), r"process 1 of 2 .* was ended by signal 9"),
        ((-9, 6), "process 0 of 2"),
        ((6, 1), "process 0 of 2 .* exit code 6"),
    ],
)
def test_the_killed_process_is_named_also_where_its_loss_ended_the_other(codes: tuple[int, int], named: str) -> None:
    launch = Launch("m", [], _hosts())
    launch.processes = [_Ended(code) for code in codes]  # type: ignore[misc]
    with pytest.raises(RankError, match=named):
        launch._settled(_NO_PIPES)
    launch.close()


class _NoPipes:
    def select(self, timeout: float) -> list[Any]:
        return []


_NO_PIPES: Any = _NoPipes()


def test_a_first_process_that_ctrl_c_ends_before_it_could_listen_was_interrupted() -> None:
    launch = Launch("m", [], _hosts())
    launch.stop()
    launch.processes = [_Ended(-signal.SIGINT), _Ended(-signal.SIGINT)]  # type: ignore[misc]
    assert launch._settled(_NO_PIPES) == 130
    launch.close()


def test_a_signal_that_comes_before_the_first_process_reaches_it_once() -> None:
    class Waiting(Launch):
        def _follower(self, rank: int, said: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=said, start_new_session=True)

    launch = Waiting("m", [], _hosts())
    launch._command = ["sleep", "60"]
    launch.forward(signal.SIGTERM)
    assert launch.work() == 128 + signal.SIGTERM
    assert launch._signals == [signal.SIGTERM]
    launch.close()


def test_ctrl_z_stops_the_processes_of_this_machine_too_and_they_go_on_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else they go on in the background, and end because nobody says any more that they are wanted."""
    states: list[list[int]] = []

    class Cats(Launch):
        def _follower(self, rank: int, said: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

        def _wait(self, pipes: Any) -> int:
            signal.raise_signal(signal.SIGTSTP)
            states.append(stopped_pids([process.pid for process in self.processes]))
            return 0

    launch = Cats("m", [], _hosts())
    launch._command = ["sleep", "60"]

    def stopped(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGSTOP)
        pids = [process.pid for process in launch.processes]
        until = time.monotonic() + 30
        while time.monotonic() < until and len(stopped_pids(pids)) < len(pids):
            pass
        states.append(stopped_pids(pids))

    monkeypatch.setattr("qwq_mlx.cli.processes.os.kill", stopped)
    before = signal.getsignal(signal.SIGTSTP)
    assert launch.work() == 0 and signal.getsignal(signal.SIGTSTP) == before
    assert states == [[process.pid for process in launch.processes], []]
    assert launch.processes[1].stdout is not None and launch.processes[1].stdout.read() in (b"", PAUSED)
    launch.processes[1].stdout.close()
    launch.close()


def test_a_follower_waits_for_a_command_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ssh, where silence means that the network broke, it is told so before."""
    said, asked, ended = iter([b"\n", b"\n" + PAUSED, PAUSED + b"\n", b"\n", b""]), list[Any](), list[int]()
    monkeypatch.setattr(follow_main.select, "select", lambda *of: (asked.append(of[3]), ([0], [], []))[1])
    monkeypatch.setattr(follow_main.os, "read", lambda *of: next(said))
    monkeypatch.setattr(follow_main.os, "kill", lambda pid, number: ended.append(number))
    follow_main._end_when_unwanted(0, 30.0)
    assert asked == [30.0, 30.0, None, 30.0, 30.0] and ended == [signal.SIGKILL]
    remote = Hosts(**{**_fields(parse_hosts("localhost,b.local")), "ports": ((1,), ())})
    assert [remote.setup(rank, signs=1, snapshots="").unwanted_s for rank in (0, 1)] == [None, 30.0]


class _Ending(_Ended):
    """Ends when it is looked at for the n-th time."""

    def __init__(self, code: int, n: int) -> None:
        super().__init__(code)
        self._n = n

    def poll(self) -> Any:
        self._n -= 1
        return None if self._n > 0 else self.returncode


def test_a_first_process_that_ends_long_behind_the_others_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end as soon as they are told to; freeing a large model takes seconds."""
    now = _Clock()
    monkeypatch.setattr("qwq_mlx.cli.launch.time.monotonic", lambda: now.tick(1.0))
    launch = Launch("m", [], _hosts())
    launch._last = lambda: 0  # type: ignore[method-assign]
    launch.processes = [_Ending(0, 4), _Ended(0)]  # type: ignore[list-item]
    assert launch._settled(_NO_PIPES) == 0
    launch.processes = [_Ending(0, 100), _Ended(0)]  # type: ignore[list-item]
    with pytest.raises(RankError, match=r"process 0 of 2 .* did not end within 8 s behind the others"):
        launch._settled(_NO_PIPES)
    launch.close()


@pytest.mark.parametrize("wanted", ["whoever reads its signs", "whoever speaks to it"])
def test_a_follower_ends_with_the_one_that_started_it(wanted: str) -> None:
    """Nobody else would end it: it is in a session of its own, perhaps on another machine."""
    heard, said = os.pipe()
    code = (
        "import os, threading; from qwq_mlx.cli import rank; from qwq_mlx.cli.follow import __main__ as follow\n"
        "threading.Thread(target=follow._end_when_unwanted, args=(0, None)).start()\n"
        "rank._write_signs(1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=said)
    os.close(said)
    assert json.loads(os.read(heard, 4096))["pid"] == process.pid
    assert process.stdin is not None
    if wanted == "whoever speaks to it":
        process.stdin.close()
    else:
        os.close(heard)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.stdin.close()
    if wanted == "whoever speaks to it":
        os.close(heard)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> float:
        """The time, later each time."""
        self.now += seconds
        return self.now


def _sign(**values: Any) -> dict[str, Any]:
    return {"done": 0, "passes": 9, "waiting_s": 0.0, "silent_s": {"0": 0.0}, "faults": 0, **values}


def _watch() -> tuple[Watch, _Clock]:
    clock = _Clock()
    return Watch(["a", "b"], clock=clock), clock


def test_who_says_nothing_is_named_in_time() -> None:
    watch, clock = _watch()
    clock.now = START_S - 1
    assert watch.failure() is None
    watch.hear(0, _sign())
    watch.hear(1, _sign())
    clock.now += SILENT_S - 0.1
    assert watch.failure() is None
    watch.hear(0, _sign())
    clock.now += 0.2
    assert (watch.failure() or (None,))[0] == 1
    other, clock = _watch()
    clock.now = START_S + 0.1
    assert other.failure() is not None


def test_processes_that_never_find_each_other_are_named() -> None:
    watch, clock = _watch()
    for now in (0.0, START_S, START_S + 1):
        assert watch.failure() is None
        clock.now = now
        for rank in range(2):
            watch.hear(rank, _sign(silent_s={}))
    failure = watch.failure()
    assert failure is not None and failure[0] == 1 and "have not found each other" in failure[1]


@pytest.mark.parametrize("late", [0.0, 15.0])
def test_processes_that_all_look_for_each_other_are_named_as_soon_as_the_silence_is(late: float) -> None:
    """They say nothing while MLX looks. Its ring asks again after 1, 2, 4 and 8 s, so who came late is found as much
    later."""
    watch, clock = _watch()
    watch.hear(0, _sign(silent_s={}, is_joining=True))
    clock.now += late
    watch.hear(1, _sign(silent_s={}))
    assert watch.failure() is None
    watch.hear(1, _sign(silent_s={}, is_joining=True))
    clock.now += SILENT_S + late - 0.1
    assert watch.failure() is None
    clock.now += 0.2
    failure = watch.failure()
    assert failure is not None and failure[0] == 1 and "found each other for" in failure[1]
    watch.hear(0, _sign(silent_s={"1": 0.0}))  # the last one waits for a connection that the first has already
    assert watch.failure() is not None
    watch.forgive()
    assert watch.failure() is None
    watch.hear(1, _sign(silent_s={"0": 0.0}))
    clock.now += SILENT_S - 0.1
    assert watch.failure() is None


def test_whoever_watches_does_not_judge_by_what_it_missed_while_it_was_stopped() -> None:
    """Signs lie in the pipes meanwhile, and tell of links that were silent because rank 0 was stopped, too."""
    watch, clock = _watch()
    for rank in range(2):
        watch.hear(rank, _sign(done=1))
    clock.now = 500.0
    watch.forgive()
    assert watch.failure() is None
    for rank in range(2):
        watch.hear(rank, _sign(done=1, silent_s={str(1 - rank): 499.0}, waiting_s=499.0))
    assert watch.failure() is None
    clock.now += SILENT_S + 0.1
    watch.hear(0, _sign(done=2))
    assert (watch.failure() or (None,))[0] == 1
    watch.hear(1, _sign(done=2))
    clock.now += 10 * STUCK_S  # the wait of 499 s says nothing of how long passes take
    watch.hear(0, _sign(done=2, waiting_s=10 * STUCK_S))
    watch.hear(1, _sign(done=2))
    assert watch.failure() is not None


def test_a_question_to_the_user_is_no_hang() -> None:
    watch, clock = _watch()
    for is_asking in (True, False):
        clock.now += 10 * STUCK_S
        watch.hear(0, _sign(is_asking=is_asking))
        watch.hear(1, _sign(waiting_s=10 * STUCK_S))
        assert watch.failure() is None or not is_asking
    watch.hear(0, _sign())
    assert watch.failure() is not None


def test_a_lost_link_is_named_only_where_both_ends_are_alive() -> None:
    watch, clock = _watch()
    watch.hear(0, _sign(silent_s={"1": SILENT_S + 0.5}))
    watch.hear(1, _sign())
    failure = watch.failure()
    assert failure is not None and "and a have not heard each other" in failure[1] and failure[0] == 1
    clock.now = SILENT_S - 1  # the other is silent here, too: it may be stopped
    watch.hear(0, _sign(silent_s={"1": SILENT_S + 5}))
    assert watch.failure() is None


@pytest.mark.parametrize(("faults", "words"), [(0, "it hangs"), (50_000, "it swaps")])
def test_a_hang_and_a_machine_that_swaps_are_told_apart(faults: int, words: str) -> None:
    watch, clock = _watch()
    for rank in range(2):
        watch.hear(rank, _sign(waiting_s=1.0))
        watch.hear(rank, _sign(done=7))
    for more, is_named in ((-0.1, False), (0.1, True)):
        clock.now = STUCK_S + more
        watch.hear(0, _sign(done=7, waiting_s=STUCK_S + 1))
        watch.hear(1, _sign(done=7, faults=faults))
        failure = watch.failure()
        assert (failure is not None) is is_named
    assert failure is not None and failure[0] == 1 and words in failure[1]


def test_a_process_that_swaps_and_goes_on_is_told_once_and_ended_where_it_lasts() -> None:
    """Imports and first passes read from disk, too."""
    watch, clock = _watch()
    said, failures = [], []
    for second in range(60):
        clock.now = float(second)
        faults = min(second, 8) * 1000 + max(0, second - 20) * 300
        watch.hear(0, _sign(done=second, passes=second // 4))
        watch.hear(1, _sign(done=second, passes=second // 4, faults=faults))
        if warning := watch.warning():
            said.append((second, warning))
        if failure := watch.failure():
            failures.append((second, failure))
    [(second, warning)] = said
    assert 20 < second <= 30 and "process 1 of 2 (b) read 1," in warning and "in 5 s: it swaps" in warning
    ended, (rank, words) = failures[0]
    assert SWAPPING_S <= ended - 20 <= SWAPPING_S + 10 and rank == 1 and "it swaps. Give it less" in words


def test_a_process_that_swaps_now_and_then_is_not_ended() -> None:
    watch, clock = _watch()
    for second in range(90):
        clock.now, n_bursts = float(second), second // 20
        for rank in range(2):
            watch.hear(rank, _sign(done=second, faults=rank * (3_000 * n_bursts + 600 * min(second % 20, 10))))
        watch.warning()
        assert watch.failure() is None


def test_the_first_pass_has_long_also_behind_a_load_of_many_short_waits() -> None:
    """CUDA compiles kernels in it for a minute or two."""
    watch, clock = _watch()
    for n_layers in range(1, 4):
        clock.now += 1.0
        for rank in range(2):
            watch.hear(rank, _sign(done=n_layers, passes=0, waiting_s=0.4, is_loading=True))
    for waiting_s in (0.0, FIRST_STUCK_S - 1):
        clock.now += waiting_s
        for rank in range(2):
            watch.hear(rank, _sign(done=4, passes=0, waiting_s=waiting_s))
    assert watch.failure() is None
    for rank in range(2):
        watch.hear(rank, _sign(done=5, passes=1))
    clock.now += FIRST_STUCK_S + 1
    for rank in range(2):
        watch.hear(rank, _sign(done=5, passes=1, waiting_s=FIRST_STUCK_S + 1))
    assert watch.failure() is not None


def test_slow_work_is_no_hang() -> None:
    watch, clock = _watch()
    for rank in range(2):
        watch.hear(rank, _sign(passes=2))
    clock.now = FIRST_STUCK_S - 1  # kernels are compiled for the first passes
    for rank in range(2):
        watch.hear(rank, _sign(passes=2, waiting_s=FIRST_STUCK_S - 1))
    assert watch.failure() is None
    for rank in range(2):
        watch.hear(rank, _sign(passes=4, done=1))
    clock.now += STUCK_S - 1
    watch.hear(0, _sign(passes=4, done=1, waiting_s=STUCK_S - 1))
    for rank in range(2):
        watch.hear(rank, _sign(passes=5, done=2))
    clock.now += 9 * (STUCK_S - 1)  # a pass took a tenth of that once
    for rank in range(2):
        watch.hear(rank, _sign(passes=5, done=2, waiting_s=9 * (STUCK_S - 1)))
    assert watch.failure() is None
    clock.now += 2 * (STUCK_S - 1)
    for rank in range(2):
        watch.hear(rank, _sign(passes=5, done=2, waiting_s=11 * (STUCK_S - 1)))
    assert watch.failure() is not None
