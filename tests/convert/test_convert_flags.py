"""Every flag of the convert command arrives at the conversion as what it says, and changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from qwq_mlx.convert import __main__ as command

FLAGS: list[tuple[list[str], str, Any]] = [
    (["--source", "there"], "source", "there"),
    (["--output", "here"], "output", "here"),
    (["--recipe", "mine.toml"], "recipe", "mine.toml"),
    (["--revision", "0" * 40], "revision", "0" * 40),
    (["--target-size", "17GB"], "target_bytes", 17_000_000_000),
    (["--calibrate", "text.txt"], "calibrate", "text.txt"),
    (["--force"], "force", True),
    (["--restart"], "restart", True),
    (["--keep-source"], "keep_source", True),
    (["--dry-run"], "dry_run", True),
    (["--workers", "3"], "n_workers", 3),
    (["--quality", "text.txt"], "quality", "text.txt"),
    (["--no-quality"], "quality", False),
    (["--quality-tokens", "77"], "quality_tokens", 77),
]


class _ReachedError(Exception):
    """Carries what the command handed to the conversion."""


def reached(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> dict[str, Any]:
    def convert(source: Any, output: Any, *, on_plan: Any, progress: Any, **chosen: Any) -> None:
        raise _ReachedError(chosen | {"source": source, "output": output})

    monkeypatch.setattr("qwq_mlx.convert.job.convert_checkpoint", convert)
    with pytest.raises(_ReachedError) as caught:
        command.main(given)
    values: dict[str, Any] = caught.value.args[0]
    return values


@pytest.mark.parametrize(("flag", "name", "expected"), FLAGS)
def test_every_flag_reaches_the_conversion(
    flag: list[str], name: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"--source": "s", "--output": "o"}
    base.pop(flag[0], None)
    others = [text for pair in base.items() for text in pair]
    values = reached(monkeypatch, [*others, *flag])
    untouched = reached(monkeypatch, ["--source", "s", "--output", "o"])
    assert values.pop(name) == expected
    assert untouched.pop(name) != expected
    assert values == untouched, "a flag changes only what it names"
