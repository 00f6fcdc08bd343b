"""Rank 0 tells the others nothing that they would do at another place than it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from configs import SMALL

from qwq_mlx.bench.models import random_module
from qwq_mlx.engine import model_runner
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.model_runner import ModelRunner
from qwq_mlx.engine.ranks.leader import Leader
from qwq_mlx.errors import RankError

pytestmark = pytest.mark.tiny


class _Link:
    """To a process that does nothing."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def send(self, message: dict[str, Any]) -> None:
        self.told.append(message["task"])


@pytest.fixture
def module() -> Any:
    module = random_module(replace(SMALL, vocab_size=32), {}, "float32", seed=1)
    module.leader = Leader(None, [_Link()])  # type: ignore[list-item]
    return module


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_after_a_failure_within_a_pass_the_others_are_told_nothing_but_to_end(
    module: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """They wait in that pass; sums of the next one would be added to what they have there."""

    def fail(*_: Any) -> None:
        raise error

    [link] = module.leader.links
    runner, cache = ModelRunner(module), new_cache(module)
    monkeypatch.setattr(model_runner, "feed_prompt", fail)
    with pytest.raises(type(error)):
        runner.prefill(cache, [1, 2])
    for again in (lambda: new_cache(module), lambda: runner.logits([cache], [[1]], [1]), module.leader.successor):
        with pytest.raises(RankError, match=r"process 0 failed in the midst .*Start all again"):
            again()
    module.leader.close()
    assert link.told == ["new", "prefill", "end"]


def test_a_failure_while_a_pass_is_waited_for_ends_the_leading_and_an_interruption_does_not(module: Any) -> None:
    runner = ModelRunner(module)
    for error, is_end in ((KeyboardInterrupt(), False), (RuntimeError("lost"), True)):
        with pytest.raises(type(error)), runner.waiting():
            raise error
        if is_end:
            with pytest.raises(RankError, match="RuntimeError: lost"):
                new_cache(module)
        else:
            new_cache(module)


def test_a_model_before_the_last_loaded_one_cannot_be_used(module: Any) -> None:
    """The others hold the last one, and would compute with that."""
    before, module.leader = module.leader, module.leader.successor()
    with pytest.raises(RankError, match="another one was loaded since"):
        before.tell("new")
    new_cache(module)
    assert module.leader.links[0].told == ["new"]
