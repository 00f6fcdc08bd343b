"""What the machine gives: asked of a stand-in for each backend, since only one is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.model import device


class FakeMlx:
    """mlx.core of a machine with a GPU; it writes down what is asked of it."""

    cpu, gpu = "cpu", "gpu"

    def __init__(self, info: dict[str, int], *, is_metal: bool) -> None:
        self._info = info
        self.metal = SimpleNamespace(is_available=lambda: is_metal)
        self.wired_bytes = 7
        self.calls: list[str] = []

    def default_device(self) -> SimpleNamespace:
        return SimpleNamespace(type=self.gpu)

    def device_info(self) -> dict[str, int]:
        return self._info

    def set_wired_limit(self, n_bytes: int) -> int:
        self.calls.append(f"wire {n_bytes}")
        before, self.wired_bytes = self.wired_bytes, n_bytes
        return before

    def synchronize(self) -> None:
        self.calls.append("synchronize")


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMlx]:
    fake = FakeMlx({"max_recommended_working_set_size": 1000, "memory_size": 1500}, is_metal=True)
    monkeypatch.setattr(device, "import_mlx", lambda: fake)
    return fake


def test_on_metal_the_limit_is_the_recommended_working_set(metal: FakeMlx) -> None:
    assert device.backend_name() == "metal"
    assert device.limit_bytes() == 1000


def test_on_metal_the_plan_is_wired_for_the_block_and_the_old_limit_put_back(metal: FakeMlx) -> None:
    with device.wired(800):
        assert metal.wired_bytes == 800
    assert metal.calls == ["wire 800", "synchronize", "wire 7"]


def test_never_more_than_the_working_set_is_wired_and_a_failure_puts_it_back_too(metal: FakeMlx) -> None:
    with pytest.raises(KeyError), device.wired(5000):
        assert metal.wired_bytes == 1000
        raise KeyError
    assert metal.wired_bytes == 7


def test_runs_that_overlap_share_the_largest_limit_and_the_last_puts_the_old_one_back(metal: FakeMlx) -> None:
    first, second = device.wired(800), device.wired(500)
    with first:
        second.__enter__()
        assert metal.wired_bytes == 800
    assert metal.wired_bytes == 500, "the first has ended, the second has not"
    second.__exit__(None, None, None)
    assert metal.wired_bytes == 7


@pytest.mark.parametrize(
    ("info", "expected"), [({"free_memory": 60, "total_memory": 80}, 60), ({"total_memory": 80}, 80)]
)
def test_on_cuda_the_limit_is_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, int], expected: int
) -> None:
    fake = FakeMlx(info, is_metal=False)
    monkeypatch.setattr(device, "import_mlx", lambda: fake)
    assert (device.backend_name(), device.limit_bytes()) == ("cuda", expected)
    with device.wired(800):
        pass
    assert fake.calls == []


def test_on_the_cpu_the_limit_is_what_the_system_calls_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake: Any = FakeMlx({}, is_metal=False)
    monkeypatch.setattr(fake, "default_device", lambda: SimpleNamespace(type=fake.cpu))
    monkeypatch.setattr(device, "import_mlx", lambda: fake)
    (tmp_path / "meminfo").write_text("MemTotal:  10 kB\nMemAvailable:    3 kB\n")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    assert (device.backend_name(), device.limit_bytes()) == ("cpu", 3 * 1024)


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("/job/step", {"": None, "job": 5000, "job/step": 9000}, 5000 - 700 + 300),  # the outer one binds
        ("/job/step", {"": None, "job": None, "job/step": 2000}, 2000 - 700 + 300),
        ("/job", {"": None, "job": 300}, 0),  # used up
        ("/job", {"": None, "job": None}, 1 << 20),
        ("/the/hosts/name", {"": 4000}, 4000 - 700 + 300),  # a container sees its own group as the root
    ],
)
def test_a_containers_limit_counts(
    version: int,
    own: str,
    limits: dict[str, int | None],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A plan that fitted the host's memory was killed in a container of less."""
    controller, _, limit, used, cache = device._GROUPS[2 - version]
    for name, size in limits.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        nothing = "max" if version == 2 else str(9223372036854771712)
        (folder / limit).write_text(f"{nothing if size is None else size}\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 400\n{cache} {0 if size == 300 else 300}\n")
    (tmp_path / "own").write_text(
        f"0::{own}\n" if version == 2 else f"9:name=systemd:/\n5:cpu:/other\n4:cpuset,memory:{own}\n"
    )
    (tmp_path / "meminfo").write_text("MemAvailable:  1024 kB\n")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(device, "_GROUPS", ((controller, tmp_path / "groups", limit, used, cache),))
    assert device.available_bytes() == expected


@pytest.mark.parametrize("text", [None, "MemTotal:  10 kB\n"])
def test_where_the_system_does_not_say_all_memory_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device, "_OWN_GROUPS", tmp_path / "none")
    assert device.available_bytes() > 1 << 28


def test_this_machine_has_a_backend_and_memory() -> None:
    assert device.backend_name() in ("cpu", "metal", "cuda")
    assert device.limit_bytes() > 1 << 28
    with device.wired(1 << 20):
        pass


def test_the_cache_is_small_inside_the_block_and_the_callers_limit_comes_back() -> None:
    mx = device.import_mlx()
    before = mx.set_cache_limit(12345)
    try:
        with pytest.raises(KeyError), device.small_cache():
            assert mx.set_cache_limit(256 << 20) == 256 << 20
            raise KeyError
        assert mx.set_cache_limit(12345) == 12345
    finally:
        mx.set_cache_limit(before)
