"""Rows that come, leave, fork, are drafted for, go back, are saved and asked, as on an NVIDIA GPU: each draws what it
draws alone. The kernel that writes into their caches is a plain twin here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest
from attention_in_place import CONFIG, module_in_place

from qwq_mlx.bench.models import random_module
from qwq_mlx.engine import pass_costs
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.drafters import model as drafter_module
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.kv_cache import borrowed, filled_cache, fork_cache, new_cache, take_out_of_batch
from qwq_mlx.engine.model_runner import run_pass
from qwq_mlx.engine.pass_costs import compile_kernels
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler
from qwq_mlx.engine.speculative import Draft
from qwq_mlx.options import NEUTRAL, Sampling

N_OUTPUT = 16
EVENTS = ("force", "go back", "save and resume", "ask", "leave", "fork", "force one", "none")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module_in_place(monkeypatch)


@dataclass
class Life:
    """What happens to a row at which number of its output ids. ids: all that it drew or was given, at its end."""

    seed: int
    prompt: list[int]
    kv_bits: int | None
    events: dict[int, str]
    ids: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    forks: list[Life] = field(default_factory=list)

    def row(self, cache: list[Any]) -> Row:
        sampling = Sampling(temperature=0.7 * (self.seed % 2)).resolve(NEUTRAL)
        return Row(Sampler(sampling, seed=self.seed), cache=cache, max_tokens=N_OUTPUT)


def a_life(chance: random.Random) -> Life:
    prompt = [chance.randrange(CONFIG.vocab_size) for _ in range(chance.choice((1, 5, 30, 200, 254, 257, 300, 1400)))]
    events = {n: chance.choice(EVENTS) for n in chance.sample(range(N_OUTPUT), 5)}
    return Life(chance.randrange(1 << 20), prompt, chance.choice((None, None, None, 8)), events)


def lived(module: Any, decoder: Decoder, life: Life, row: Row | None = None) -> Iterator[Row | tuple[Life, Row]]:
    """A row through its life: yields it where a step is due, and forks of it with theirs."""
    if row is None:
        row = life.row(new_cache(module, life.kv_bits))
        for _ in decoder.prefill(row, life.prompt, chunk=128):
            pass
    events = dict(life.events)
    while not row.is_full:
        event, n = events.pop(row.n_output, "none"), len(row.ids)
        if event == "force" and row.n_output + 4 < N_OUTPUT:
            decoder.force(row, [5, 6, 7])
        elif event == "force one":
            decoder.force(row, [9])
        elif event == "go back":
            row.rewind(max(0, row.n_output - 3))
        elif event == "save and resume" and row.ids and row.cache[0].offset:
            resumed = life.row(filled_cache(module, row.cached(n - 1), life.kv_bits))
            mx.eval([layer.state for layer in resumed.cache])
            resumed.start(life.prompt, row.ids[len(life.prompt) :])
            row = resumed
        elif event == "ask" and row.cache[0].offset >= n - 1 > 0:
            row.draw_again()
            with borrowed(row.cache, n - 1):
                asked = life.row(row.cache)
                asked.may_draft = False
                asked.start(life.prompt, row.ids[len(life.prompt) :])
                decoder.force(asked, [1, 2])
                life.asked += [decoder.draw(asked).id for _ in range(2)]
        elif event == "leave":
            take_out_of_batch(row.cache)
        elif event == "fork" and row.cache[0].offset >= n - 1 > 0:
            fork = Life(life.seed + 1, list(row.ids), life.kv_bits, {3: "go back", 6: "leave"})
            forked = fork.row(fork_cache(module, row.cache, n - 1, life.kv_bits))
            forked.start(fork.prompt)
            life.forks.append(fork)
            yield fork, forked
        if not row.is_full:
            yield row
    life.ids = list(row.ids)


class Guesses:
    """Drafts by a model, the same one, and at random."""

    def __init__(self, module: Any, chance: random.Random) -> None:
        self.chance = chance
        self.drafter = ModelDrafter(module, n_ids=CONFIG.vocab_size, chunk=128, context=2048)
        self.n_right = self.n_wrong = 0

    def is_due(self, rows: Sequence[Row]) -> bool:
        return self.chance.random() < 0.5

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        n_each = [min(self.chance.randrange(4), row.most_drafts) for row in rows]
        if self.chance.random() < 0.5:
            guesses = self.drafter.guess(rows, n_each)
            return [Draft(tuple(each.id for each in own), "model") for own in guesses]
        return [Draft(tuple(self.chance.randrange(CONFIG.vocab_size) for _ in range(n)), "luck") for n in n_each]

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        self.n_right += n_accepted
        self.n_wrong += len(draft.ids) - n_accepted


def alone(module: Any, life: Life) -> None:
    decoder = Decoder(module, n_ids=CONFIG.vocab_size)
    for due in lived(module, decoder, life):
        if isinstance(due, Row):
            decoder.draw(due)
        else:
            for own in lived(module, Decoder(module, n_ids=CONFIG.vocab_size), *due):
                assert isinstance(own, Row)
                decoder.draw(own)


def together(module: Any, lives: Sequence[Life], chance: random.Random) -> Guesses:
    """All of them, a few at a time in a pass, coming one after another."""
    guesses = Guesses(module, chance)
    decoder = Decoder(module, n_ids=CONFIG.vocab_size, drafts=guesses)
    waiting = [lived(module, decoder, life) for life in lives]
    running: list[Iterator[Any]] = []
    due: dict[int, Row] = {}
    while waiting or running:
        while waiting and (len(running) < 2 or chance.random() < 0.3):
            running.append(waiting.pop())
        for each in list(running):
            while id(each) not in due:
                came = next(each, None)
                if came is None:
                    running.remove(each)
                    break
                if isinstance(came, Row):
                    due[id(each)] = came
                else:
                    waiting.insert(0, lived(module, decoder, *came))
        chosen = [key for key in due if chance.random() < 0.8]
        if chosen:
            decoder.step([due[key] for key in chosen])
            for key in chosen:
                assert due.pop(key).failure is None
    return guesses


@pytest.mark.parametrize("seed", [0, 2])
def test_whatever_happens_a_row_draws_what_it_draws_alone(module: Any, seed: int) -> None:
    chance = random.Random(seed)
    lives = [a_life(chance) for _ in range(6)]
    copies = [replace(life, ids=[], asked=[], forks=[]) for life in lives]
    guesses = together(module, lives, chance)
    for life, copy in zip(lives, copies, strict=True):
        alone(module, copy)
        for found, expected in zip([life, *life.forks], [copy, *copy.forks], strict=True):
            assert found.ids == expected.ids and found.asked == expected.asked
            assert len(found.ids) == len(found.prompt) + N_OUTPUT
    assert guesses.n_right and guesses.n_wrong


def test_a_draft_model_needs_no_kernels_of_more_rows_to_catch_up(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA compiles kernels for each 8 rows, seconds for each, and a run would wait for them."""
    passes = recorded_passes(monkeypatch, drafter_module)
    drafter = ModelDrafter(module, n_ids=CONFIG.vocab_size, chunk=128, context=2048)
    row = Row(Sampler(Sampling(temperature=0.0).resolve(NEUTRAL), seed=0), cache=new_cache(module))
    row.start([3 * place % 60 for place in range(30)])
    [[guess, _]] = drafter.guess([row], [2])
    assert passes == [8, 8, 8, 6, 1]
    assert guess.id == mx.argmax(module(mx.array([row.ids]))[0, -1]).item()


def test_kernels_of_one_row_and_of_each_8_are_compiled_where_rows_attend_in_place(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = recorded_passes(monkeypatch, pass_costs)
    compile_kernels(module, 20)
    assert passes == [1, 8, 16, 20]
    passes.clear()
    compile_kernels(random_module(CONFIG, {}, "float32", seed=1), 20)
    assert passes == []


def recorded_passes(monkeypatch: pytest.MonkeyPatch, home: Any) -> list[int]:
    """The ids of each pass of a module of ours, of all rows together, as they come."""
    passes = []

    def run(module: Any, ids: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(ids.size)
        return run_pass(module, ids, *arguments, **options)

    monkeypatch.setattr(home, "run_pass", run)
    return passes
