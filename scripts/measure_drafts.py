"""Tokens a second with drafts at QwQ-32B's full size, real costs and the acceptance of real text: no 32B is needed.

    python scripts/measure_drafts.py TRACES.jsonl --tokenizer FOLDER [--layers 64] [--outputs 4] [--tokens 400]

The weights are random, of QwQ-32B's shape at 4 bits; every draw is worked out and then replaced by the recorded id, so
passes cost what they cost and drafts are right where they were in the recorded text. The automaton is the real one. The
draft model has the shape of Qwen2.5-0.5B at 4 bits and random weights; its ids are the recorded ones, each made wrong
with probability 1 - NAMED (--named, 0.655: what the plain Qwen2.5-Coder-0.5B names of QwQ's tokens), so its cost is
real and its acceptance is modelled. A third drafter is always wrong.

For each output: mlx-lm's loop on the same weights, and our plain loop before and behind each drafter, whose rate is
also given as a share of the mean of these two: a host's speed moves by more than a drafter loses. One JSON line a
result on stdout; costs of passes first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
from replay_drafts import Output, read_outputs, show

from qwq_mlx.bench.loops import sampling, their_ids
from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.engine import drawing
from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.draft_length import costs_at
from qwq_mlx.engine.drafters.model import RAGGED, ModelDrafter
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.speculator import Speculator
from qwq_mlx.engine.drafters.suffix_automaton import Guess
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.engine.pass_costs import compile_kernels, measure_costs
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.sampler import Sampler, draw_rows
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED
from qwq_mlx.options import NEUTRAL

_SMALL = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
_KIND = 5  # all its drafts are trusted alike, as nothing tells them apart
_WARM_UP = 8  # tokens that are not timed


class Recorded(Sampler):
    """A sampler in whose place `recorded_rows` gives the recorded ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(sampling().resolve(NEUTRAL), seed=0)
        self.ids = list(ids)


def recorded_rows(samplers: Sequence[Any], logits: Any, indices: Sequence[int]) -> Any:
    """Draw as ever, and then give the recorded ids in place of what was drawn."""
    drawn = draw_rows(samplers, logits, indices)
    ids = [sampler.ids[min(index, len(sampler.ids) - 1)] for sampler, index in zip(samplers, indices, strict=True)]
    return mx.where(drawn < logits.shape[-1], mx.array(ids, mx.uint32), drawn)


class Modelled(ModelDrafter):
    """A draft model that names the recorded ids with a fixed probability."""

    def __init__(self, module: Any, *, n_ids: int, named: float) -> None:
        super().__init__(module, n_ids=n_ids, chunk=2048, context=32_768)
        self._named = named

    def guess(self, rows: Sequence[Row], n_each: Sequence[int]) -> list[list[Guess]]:
        """As the model costs; an id is wrong or right whenever it is asked for at a place."""
        drafted = super().guess(rows, n_each)
        right, total = self._trust.get(_KIND, (self._named, 1.0))
        changed = []
        for row, guesses in zip(rows, drafted, strict=True):
            own = []
            for place, guess in enumerate(guesses, start=row.n_output):
                is_right = (place * 2_654_435_761 % 2**32) / 2**32 < self._named
                own.append(Guess(guess.id if is_right else (guess.id + 1) % self._n_ids, right / total, _KIND))
            changed.append(own)
        return changed


class Wrong(NgramDrafter):
    """Sure of ids that never come."""

    def guess(self, row: Any, n_most: int) -> list[Guess]:
        """Id 7, which QwQ's texts do not have."""
        return [Guess(7, 0.95, 30)] * n_most

    def learn(self, guesses: list[Guess], n_right: int) -> None:
        """Nothing."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--outputs", type=int, default=4, help="outputs, spread over the file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="of each output (default: %(default)s)")
    parser.add_argument(
        "--named", type=float, default=0.655, help="of the ids, by the draft model (default: %(default)s)"
    )
    options = parser.parse_args()
    config, packed = qwq_shaped(options.layers)
    module = random_module(config, packed, default_compute_type(), seed=0)
    theirs = in_compute_type(module, config, packed, default_compute_type())
    small = replace(config, num_hidden_layers=24 if options.layers == 64 else 1, **_SMALL)
    small_packed = {path: each for path, each in packed.items() if _layer(path) < small.num_hidden_layers}
    small_module = random_module(small, small_packed, default_compute_type(), seed=1)
    compile_kernels(module, 1 + MAX_DRAFTED)
    compile_kernels(small_module, RAGGED)
    drafter = Modelled(small_module, n_ids=config.vocab_size, named=options.named)
    measured = measure_costs(
        module,
        n_ids=config.vocab_size,
        drafter=drafter,
        most_rows=1 + MAX_DRAFTED,
        most_context=config.max_position_embeddings,
    )
    costs = costs_at(measured)
    show(
        {
            "device": str(mx.device_info().get("device_name") or mx.default_device()),
            "costs": [asdict(each) for each in measured],
        }
    )
    outputs = read_outputs(options.traces, options.tokenizer, options.outputs, options.tokens)
    drafters = {
        "ngram": Speculator(ngram=NgramDrafter(), costs=costs),
        "model": Speculator(model=drafter, costs=costs),
        "both": Speculator(ngram=NgramDrafter(), model=drafter, costs=costs),
        "wrong": Speculator(ngram=Wrong(), costs=costs),
    }
    rates: dict[str, list[float]] = {name: [] for name in ("mlx-lm", "plain", *drafters)}
    shares: dict[str, list[float]] = {name: [] for name in drafters}
    for output in outputs:
        rates["mlx-lm"].append(their_rate(theirs, output))
        before = our_rate(module, output, None)
        for name, each in drafters.items():
            rate, behind = our_rate(module, output, each), our_rate(module, output, None)
            rates[name].append(rate)
            rates["plain"].append(before)
            shares[name].append(2 * rate / (before + behind))
            before = behind
        latest = {name: round(own[-1], 1) for name, own in rates.items()}
        show({"tok_s": latest, "of_plain": {name: round(own[-1], 3) for name, own in shares.items()}})
    show(
        {
            "median_tok_s": {name: round(statistics.median(own), 1) for name, own in rates.items()},
            "median_of_plain": {name: round(statistics.median(own), 3) for name, own in shares.items()},
            "lowest_of_plain": {name: round(min(own), 3) for name, own in shares.items()},
            "plain_tok_s": [round(each, 1) for each in rates["plain"]],
            "drafts": {name: each.summary for name, each in drafters.items()},
        }
    )


def _layer(path: str) -> int:
    parts = path.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else 0


def our_rate(module: Any, output: Output, drafts: Speculator | None) -> float:
    """Tokens a second of one output by our decoder."""
    drawing.draw_rows = recorded_rows
    decoder = Decoder(module, n_ids=module.args.vocab_size, drafts=drafts)
    row = Row(Recorded(output.ids), cache=new_cache(module), max_tokens=len(output.ids))
    for _ in decoder.prefill(row, output.prompt, chunk=2048):
        pass
    for _ in range(_WARM_UP):
        decoder.draw(row)
    started = time.perf_counter()
    while not row.is_full:
        decoder.draw(row)
    seconds = time.perf_counter() - started
    drawing.draw_rows = draw_rows
    assert row.ids[row.n_prompt :] == output.ids, "the recorded ids were drawn"
    return (len(output.ids) - _WARM_UP) / seconds


def their_rate(module: Any, output: Output) -> float:
    """Tokens a second of as many ids by mlx-lm's generate_step."""
    started = 0.0
    for place, _ in enumerate(their_ids(module, output.prompt, len(output.ids))):
        if place + 1 == _WARM_UP:
            started = time.perf_counter()
    return (len(output.ids) - _WARM_UP) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
