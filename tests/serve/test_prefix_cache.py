"""Caches that go from turn to turn: what is reused, and that the plan's memory is never exceeded by what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import CHAT, Served, held_steps, until, user

from qwq_mlx.generate.batch import plan_rows
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.memory.activations import n_positions
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.serve.metrics import Counters
from qwq_mlx.serve.prefix_cache import PrefixCache
from qwq_mlx.serve.rows import Rows

pytestmark = pytest.mark.pocket

FIRST = "What is 13 + 4?"


def turn(served: Served, messages: list[dict[str, str]], **fields: Any) -> tuple[dict[str, Any], int, int]:
    """The message, the prompt's tokens, and those of it that were cached."""
    body = served.post(CHAT, {"messages": messages, "temperature": 0, **fields})
    usage = body["usage"]
    return body["choices"][0]["message"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def rows_beside_a_run(reasoner: Reasoner) -> tuple[Rows, Stream]:
    """Empty rows, and a run behind a prompt long enough to be shared, of which one token is drawn."""
    run = reasoner.stream("What is 3 + 4? " * 20, limits=Limits(max_tokens=8, prefill_step=64))
    next(run)
    return Rows(reasoner, width=8, n_prefixes=0, planned_bytes=0, counters=Counters()), run


def test_a_second_turn_feeds_only_what_is_new(pocket_server: Served, pocket_reasoner: Reasoner) -> None:
    asked = {"role": "user", "content": FIRST}
    first, n_first, _ = turn(pocket_server, [asked])
    again = {"role": "user", "content": "What is 2 + 9?"}
    whole = {"role": "assistant", "content": first["content"], "reasoning": first["reasoning"]}
    second, n_second, n_cached = turn(pocket_server, [asked, whole, again])
    text = first["reasoning"] + first["content"]
    alone = pocket_reasoner.generate(
        [asked, {"role": "assistant", "content": text}, again], sampling=Sampling(temperature=0)
    )
    assert second["reasoning"] + second["content"] == alone.text and n_second == len(alone.prompt_ids)
    assert n_first + 10 < n_cached < n_second, "the thinking came back, so the whole reply is in the cache"
    bare = {"role": "assistant", "content": first["content"]}
    _, n_third, n_cached = turn(pocket_server, [asked, bare, again], max_tokens=1)
    assert n_first <= n_cached < n_third, "the client dropped the thinking, so the cache reaches to where it began"


def test_the_same_prompt_again_is_cached_but_for_its_last_id(pocket_server: Served) -> None:
    asked = [{"role": "user", "content": "What is 21 + 4?"}]
    first, n_prompt, _ = turn(pocket_server, asked)
    second, _, n_cached = turn(pocket_server, asked)
    assert (second, n_cached) == (first, n_prompt - 1)


def test_what_a_client_left_behind_is_of_use_to_the_next(pocket_server: Served) -> None:
    with held_steps() as allow:
        connection, response = pocket_server.open_stream(user("What is 33 + 5?", temperature=0))
        until(lambda: pocket_server.server.worker.n_running == 1)
        allow(3)
        while b'"content":"' not in (line := response.readline()) and b'"reasoning":"' not in line:
            pass
        connection.close()
        response.close()
    until(lambda: pocket_server.is_idle)
    _, n_prompt, n_cached = turn(pocket_server, [{"role": "user", "content": "What is 33 + 5?"}], max_tokens=1)
    assert n_cached == n_prompt - 1


@pytest.fixture(scope="module")
def tiny(known_checkpoint: Path) -> Reasoner:
    return load(known_checkpoint)


def finished(reasoner: Reasoner, question: str) -> Stream:
    stream = reasoner.stream(question, sampling=Sampling(temperature=0), limits=Limits(max_tokens=2))
    for _ in stream:
        pass
    return stream


def test_the_longest_is_taken_once_and_the_oldest_dropped(tiny: Reasoner) -> None:
    cache, questions = PrefixCache(2), ["How many r in strawberry.", "What is 3 + 4?", "What is 3 + 5?"]
    streams = [finished(tiny, question) for question in questions]
    for stream in streams:
        cache.keep(stream)
    assert len(cache) == 2 and not streams[0].running.row.cache
    plan = streams[1].request.plan
    assert cache.n_bytes == sum(
        plan.kv_bytes_per_token * n_positions(len(each.running.row.ids)) for each in streams[1:]
    )
    assert cache.take(streams[2].request) is streams[2]
    assert cache.take(tiny.stream("How many e in blueberry?").request) is streams[1]
    assert cache.take(streams[2].request) is None and cache.n_bytes == 0


def test_a_prompt_that_only_begins_alike_leaves_a_long_one_alone(tiny: Reasoner) -> None:
    cache, long = PrefixCache(2), finished(tiny, "What is 3 + 4? " * 20)
    cache.keep(long)
    assert cache.take(tiny.stream("How many r in strawberry.").request) is None


def test_a_request_that_needs_the_memory_gets_it(tiny: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tiny, width=2, n_prefixes=8, planned_bytes=0, counters=Counters())
    request = tiny.stream("What is 3 + 4?").request
    for question in ("a", "b", "c"):
        rows.prefixes.keep(finished(tiny, question))
    alone, kept = request.plan.peak_bytes + request.plan.reserve_bytes, rows.prefixes.n_bytes
    for limit, fits, n_kept in ((alone + kept, True, 3), (alone + kept - 1, True, 2), (alone - 1, False, 0)):
        monkeypatch.setattr(tiny, "limit_bytes", limit)
        assert (rows.fits([request]), len(rows.prefixes)) == (fits, n_kept)


def test_rows_behind_one_long_prompt_are_admitted_by_what_they_hold_together(
    tiny: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices of one request before they begin, and forks that run; requests that only look alike are not."""
    rows, run = rows_beside_a_run(tiny)
    request, n_shared = run.request, len(run.request.prompt_ids) - 1
    plan = plan_rows([request] * 5, 5, limit_bytes=None)
    monkeypatch.setattr(tiny, "limit_bytes", plan.peak_bytes + plan.reserve_bytes - 1)
    assert rows.fits([request] * 5) and not rows.fits([replace(request) for _ in range(5)])

    streams = [run, *(run.fork(at=0, seed=seed) for seed in range(3))]
    rows._choices = [SimpleNamespace(stream=stream) for stream in streams]  # type: ignore[misc]
    assert rows.fits([*(stream.request for stream in streams), replace(request)])
    saved = rows._shared_bytes([stream.request for stream in streams])
    copied = 4 * n_shared * plan.kv_bytes_per_token // tiny.model.config.num_hidden_layers
    assert n_shared >= 256 and saved == 3 * n_shared * plan.kv_bytes_per_token - copied


def test_samples_of_a_run_are_admitted_by_what_they_share_with_it(
    tiny: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As votes of a run come, one job after another: by the plan that `generate --samples` makes of them all."""
    rows, run = rows_beside_a_run(tiny)
    request, n_shared = run.request, len(run.request.prompt_ids) - 1
    source = SimpleNamespace(streams=[run])
    fork: Any = SimpleNamespace(ask=SimpleNamespace(n=1), n_choices=1, requests=[replace(request)], source=(source, 0))
    rows._choices = [SimpleNamespace(stream=run)]  # type: ignore[list-item]
    for n_rows in (2, 3, 4):
        plan = plan_rows([request] * n_rows, n_rows, limit_bytes=None, n_shared=n_shared)
        needed = plan.peak_bytes + plan.reserve_bytes
        monkeypatch.setattr(tiny, "limit_bytes", needed)
        assert rows.has_room(fork) and not rows.fits([*rows._running(), *fork.requests]), n_rows
        monkeypatch.setattr(tiny, "limit_bytes", needed - 1)
        assert not rows.has_room(fork), n_rows
        rows._choices.append(SimpleNamespace(stream=run.fork(at=0, seed=n_rows)))  # type: ignore[arg-type]

    other = finished(tiny, "something else")
    rows._choices.append(SimpleNamespace(stream=other))  # type: ignore[arg-type]
    whole = plan_rows([*rows._running(), request], 6, limit_bytes=None)
    copies = 5 - 1 - 5 / tiny.model.config.num_hidden_layers
    needed = whole.peak_bytes + whole.reserve_bytes - int(copies * n_shared * whole.kv_bytes_per_token)
    for limit, has_room in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(tiny, "limit_bytes", limit)
        assert rows.has_room(fork) is has_room
