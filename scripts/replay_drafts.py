"""Tokens a pass that drafts would have given on recorded outputs, teacher-forced: no big model is run.

    python scripts/replay_drafts.py TRACES.jsonl --tokenizer FOLDER                    the automaton alone, seconds
    python scripts/replay_drafts.py TRACES.jsonl --draft FOLDER [--limit N]            a draft model, and both
    python scripts/replay_drafts.py TRACES.jsonl --draft FOLDER --save FILE.npz        only what the model names (a GPU)
    python scripts/replay_drafts.py TRACES.jsonl --tokenizer FOLDER --drafts FILE.npz  the rest of it, without a GPU
    python scripts/replay_drafts.py TRACES.jsonl --draft FOLDER --target FOLDER        acceptance of coupled draws

The file is as `recorded` says. A pass drafts up to K ids and keeps those that are the recorded ones, plus one: what the
recorded model would have drawn anyway. A greedy draft behind right ids is the same whatever the length, so one pass of
the draft model over an output gives its drafts at every place; outputs of about one length share a pass.

With --target, over places of the outputs: how often coupled draws of both models agree, beside sum of p * q (drafts
drawn on their own, kept where equal) and sum of min(p, q) (rejection sampling), at several temperatures.

Runs on any backend of MLX; the automaton needs none. One JSON line a result on stdout, progress on stderr. Speed-ups
are projections: tokens a pass over published costs of a pass (see _CHIPS), never measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from recorded import read_rows

from qwq_mlx.engine.draft_length import PassCosts, best_lengths, expected_right
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.suffix_automaton import Guess

_LENGTHS = (1, 2, 3, 4, 5, 8)
_SYNC = 0.08  # of a pass, as published estimates for mlx-lm's loop on Macs say; not measured by us
_DRAFT = 0.075  # of a pass: one id of a 4-bit 0.5B beside a 4-bit 32B (2.5 ms of 33 ms)
# Published costs of 1, 2, 3 ... rows relative to one row, stock MLX kernels; gaps are interpolated.
_CHIPS = {
    "M4 Pro": (1.0, 0.99, 1.13, 1.43, 1.75, 2.11, 2.48, 2.84, 3.26),  # ml-explore/mlx#3852
    "M3 Max": (1.0, 1.12, 1.20, 1.31, 1.43, 1.54, 1.65),  # ml-explore/mlx#3553
    "M5 Max": (1.0, 1.06, 1.12, 1.30, 1.48, 1.74, 1.99, 2.25, 2.48),  # ml-explore/mlx#3791
}


class Output(NamedTuple):
    """One recorded output: ids of its prompt and of what was written."""

    prompt: list[int]
    ids: list[int]


class Text:
    """A text that grows, as the automaton reads it."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.n_restarts = 0


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="JSON lines with id, prompt, response")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the draft model's)")
    parser.add_argument("--draft", type=Path, help="folder of a draft model")
    parser.add_argument("--target", type=Path, help="folder of a larger model: acceptance of coupled draws")
    parser.add_argument("--save", type=Path, help="write what the draft model names to this file, and stop")
    parser.add_argument("--drafts", type=Path, help="such a file, of the same outputs, in place of --draft")
    parser.add_argument("--batch-ids", type=int, default=4096, help="in a pass of the model (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="outputs to read, spread over the file (default: all)")
    parser.add_argument("--max-ids", type=int, default=4096, help="ids of an output to read (default: %(default)s)")
    options = parser.parse_args()
    folder = options.tokenizer or options.draft
    if folder is None:
        parser.error("give --tokenizer or --draft")
    if options.draft is None and (options.save is not None or options.target is not None):
        parser.error("--save and --target need --draft")
    if options.drafts is not None and options.draft is not None:
        parser.error("--drafts takes the place of --draft; leave one of them out, and give --tokenizer")
    outputs = read_outputs(options.traces, folder, options.limit, options.max_ids)
    show({"outputs": len(outputs), "tokens": sum(len(each.ids) for each in outputs)})
    if options.target is not None:
        for result in acceptance(outputs, options.draft, options.target):
            show(result)
        return
    drafts = None
    if options.drafts is not None:
        drafts = read_drafts(options.drafts, outputs)
    elif options.draft is not None:
        drafts = model_drafts(outputs, options.draft, options.batch_ids)
    if drafts is not None:
        named = [guess.id == token_id for own, out in zip(drafts, outputs, strict=True)
                 for guess, token_id in zip(own, out.ids, strict=True)]  # fmt: skip
        show({"drafter": "model", "named": round(sum(named) / len(named), 4)})
        if options.save is not None:
            save_drafts(options.save, drafts)
            return
    for is_shared in (False, True):
        for length in _LENGTHS:
            show({"drafter": "ngram", "shared": is_shared} | replay(outputs, length, is_shared, None))
    if drafts is None:
        return
    for name in ("model", "both"):
        for length in _LENGTHS:
            show({"drafter": name} | replay(outputs, length, True, drafts, uses_ngram=name == "both"))


def show(result: dict[str, Any]) -> None:
    """One line of JSON, at once."""
    print(json.dumps(result), flush=True)


def read_outputs(path: Path, folder: Path, limit: int | None, max_ids: int) -> list[Output]:
    """The recorded outputs as ids, every n-th where there is a limit."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    rows = read_rows(path)
    step = 1 if limit is None else max(1, len(rows) // limit)
    chosen = rows[::step] if limit is None else rows[::step][:limit]
    opening, closing = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    outputs = [Output(ids(f"{opening}{row['prompt']}{closing}"), ids(row["response"])[:max_ids]) for row in chosen]
    return [each for each in outputs if each.ids]


def replay(
    outputs: Sequence[Output],
    length: int,
    is_shared: bool,
    drafts: Sequence[Sequence[Guess]] | None,
    *,
    uses_ngram: bool = True,
) -> dict[str, Any]:
    """Passes that the outputs take with drafts of at most `length` ids.

    is_shared: one automaton over all outputs, one after another, as in a file of questions; else one each.
    drafts: what the draft model names at every place, None for the automaton alone.
    """
    started, n_passes, n_tokens, counts = time.process_time(), 0, 0, dict.fromkeys(("ngram", "model"), 0)
    drafter, trust = NgramDrafter(), _Trust()
    speeds = {name: [0.0, 0.0] for name in _CHIPS}
    for place, output in enumerate(outputs):
        if not is_shared:
            drafter.forget_texts()
        text, done = Text(output.prompt), 0
        while done < len(output.ids):
            following = output.ids[done : done + length]
            guesses = drafter.guess(text, length) if uses_ngram else []
            by_model: Sequence[Guess] = () if drafts is None else drafts[place][done : done + length]
            n_by_ngram, n_by_model = _n_right(guesses, following), _n_right(by_model, following)
            is_model = bool(by_model) and trust.expected(by_model) >= expected_right(
                [each.probability for each in guesses]
            )
            n_right = n_by_model if is_model else n_by_ngram
            counts["model" if is_model else "ngram"] += n_right
            for name, costs in _CHIPS.items():
                _project(
                    speeds[name], costs, [] if is_model else guesses, by_model if is_model else (), following, trust
                )
            if guesses:
                drafter.learn(guesses, min(n_by_ngram, len(guesses)))
            trust.learn(by_model, n_by_model)
            n_new = min(n_right + 1, len(output.ids) - done)
            text.ids += output.ids[done : done + n_new]
            done += n_new
            n_passes += 1
        n_tokens += len(output.ids)
        sys.stderr.write(f"\r{place + 1}/{len(outputs)} {n_tokens / n_passes:.3f} tokens a pass ")
    sys.stderr.write("\n")
    return {
        "length": length,
        "tokens_a_pass": round(n_tokens / n_passes, 3),
        "accepted": counts,
        "cpu_s": round(time.process_time() - started, 1),
        "projected_speed_up": {name: round(plain / spent, 2) for name, (plain, spent) in speeds.items() if spent},
    }


def _project(
    speed: list[float],
    relative: Sequence[float],
    guesses: Sequence[Guess],
    by_model: Sequence[Guess],
    following: Sequence[int],
    trust: _Trust,
) -> None:
    """Add what this pass and the plain passes for its tokens would cost on a chip, with the length that pays there."""
    costs = PassCosts(by_rows=tuple(relative), sync_s=_SYNC, draft_s=_DRAFT if by_model else 0.0)
    chosen = by_model or guesses
    probabilities = trust.of(by_model) if by_model else [each.probability for each in guesses]
    best = best_lengths([probabilities], costs, are_to_draft=bool(by_model))
    speed[0] += 1 + _n_right(chosen[: best.by_row[0]], following)
    speed[1] += best.seconds


def _n_right(guesses: Sequence[Guess], following: Sequence[int]) -> int:
    pairs = zip(guesses, following, strict=False)
    return next(
        (n for n, (guess, token_id) in enumerate(pairs) if guess.id != token_id), min(len(guesses), len(following))
    )


class _Trust:
    """How often drafts of the model of some probability were right."""

    def __init__(self) -> None:
        self._counts = [[0.5, 1.0] for _ in range(21)]

    def of(self, guesses: Sequence[Guess]) -> list[float]:
        return [self._counts[each.kind][0] / self._counts[each.kind][1] for each in guesses]

    def expected(self, guesses: Sequence[Guess]) -> float:
        return expected_right(self.of(guesses))

    def learn(self, guesses: Sequence[Guess], n_right: int) -> None:
        for place, guess in enumerate(guesses[: n_right + 1]):
            self._counts[guess.kind][0] += place < n_right
            self._counts[guess.kind][1] += 1.0


def chunks(module: Any, output: Output, size: int) -> Iterator[tuple[int, Any]]:
    """Logits behind each place before an output's ids, (n, vocab) float32, with the first one's place."""
    import mlx.core as mx

    from qwq_mlx.engine.kv_cache import grow, new_cache

    ids, cache = [*output.prompt, *output.ids[:-1]], new_cache(module)
    first = len(output.prompt) - 1
    for start in range(0, len(ids), size):
        now = ids[start : start + size]
        grow(cache, len(now))
        hidden = module.model(mx.array([now]), cache=cache)
        n_before = max(0, first - start)
        if n_before < len(now):
            head = module.model.embed_tokens.as_linear if module.args.tie_word_embeddings else module.lm_head
            yield start + n_before - first, head(hidden[:, n_before:])[0].astype(mx.float32)
        else:
            mx.eval(hidden)


def model_drafts(outputs: Sequence[Output], folder: Path, batch_ids: int) -> list[list[Guess]]:
    """What the draft model names at every place of each output, and how probable it finds that."""
    from qwq_mlx.model.device import small_cache
    from qwq_mlx.model.load import load_model
    from qwq_mlx.tune_draft.examples import Example
    from qwq_mlx.tune_draft.tokens_a_pass import named
    from qwq_mlx.tune_draft.windows import batches, cut

    examples = [
        Example(problem="", prompt_ids=tuple(each.prompt), ids=tuple(each.ids), is_written=(True,) * len(each.ids))
        for each in outputs
    ]
    whole = max(len(each.prompt) + len(each.ids) for each in outputs)
    module = load_model(folder).module
    drafts: list[list[Guess]] = [[] for _ in outputs]
    n_done, started = 0, time.perf_counter()
    with small_cache(1 << 30):  # batches differ in shape, and on CUDA what is freed would fill the card
        for batch in batches(cut(examples, whole + whole % 2), batch_ids):
            for window, found in zip(batch.windows, named(module, batch), strict=True):
                pairs = zip(found.ids, found.probabilities, strict=True)
                drafts[window.example] = [Guess(token_id, share, int(20 * share)) for token_id, share in pairs]
            n_done += len(batch.targets)
            rate = n_done / (time.perf_counter() - started)
            sys.stderr.write(f"\r{n_done:,} ids by the draft model, {rate:.0f} ids/s ")
    sys.stderr.write("\n")
    return drafts


def save_drafts(path: Path, drafts: Sequence[Sequence[Guess]]) -> None:
    """Write drafts for `read_drafts`."""
    flat = [guess for own in drafts for guess in own]
    ids, shares = np.array([each.id for each in flat], np.int32), np.array([each.probability for each in flat])
    np.savez_compressed(path, ids=ids, shares=shares.astype(np.float32))


def read_drafts(path: Path, outputs: Sequence[Output]) -> list[list[Guess]]:
    """What `save_drafts` wrote for these outputs."""
    arrays = np.load(path)
    pairs = iter(zip(arrays["ids"].tolist(), arrays["shares"].tolist(), strict=True))
    drafts = [
        [Guess(token_id, share, int(20 * share)) for token_id, share in itertools.islice(pairs, len(each.ids))]
        for each in outputs
    ]
    assert next(pairs, None) is None and len(drafts[-1]) == len(outputs[-1].ids), f"{path}: is of other outputs"
    return drafts


def acceptance(
    outputs: Sequence[Output],
    draft: Path,
    target: Path,
    temperatures: Sequence[float] = (0.0, 0.3, 0.7, 1.0),
    size: int = 128,
) -> Iterator[dict[str, Any]]:
    """How often a draft is kept, by three rules, over all places so far; after each output."""
    import mlx.core as mx

    from qwq_mlx.engine.sampler import gumbel
    from qwq_mlx.model.load import load_model

    models = [load_model(folder) for folder in (draft, target)]
    n_ids = min(model.tokenizer.n_ids for model in models)
    ids, sums, n_places = mx.arange(n_ids), {each: [0.0, 0.0, 0.0] for each in temperatures}, 0
    draws: Callable[[Any, Any], Any] = mx.vmap(lambda key: gumbel(key, ids))  # type: ignore[assignment]
    for number, output in enumerate(outputs):
        pairs = zip(*(chunks(model.module, output, size) for model in models), strict=True)
        for (place, q_logits), (_, p_logits) in pairs:
            n = q_logits.shape[0]
            keys = mx.random.split(mx.random.key(1_000_003 * number + place), n)
            noise = draws(keys)  # type: ignore[call-arg]
            for temperature in temperatures:
                scaled = [each[:, :n_ids] / max(temperature, 1e-6) for each in (q_logits, p_logits)]
                if temperature == 0.0:
                    equal = (mx.argmax(scaled[0], axis=-1) == mx.argmax(scaled[1], axis=-1)).sum().item()
                    values = [equal] * 3
                else:
                    q, p = (mx.softmax(each, axis=-1) for each in scaled)
                    drawn = [mx.argmax(each + noise, axis=-1) for each in scaled]
                    values = [(drawn[0] == drawn[1]).sum(), (p * q).sum(), mx.minimum(p, q).sum()]
                    mx.eval(values)
                    values = [each.item() for each in values]
                sums[temperature] = [a + float(b) for a, b in zip(sums[temperature], values, strict=True)]
            n_places += n
        rows = {
            str(each): dict(zip(("coupled", "sum_pq", "sum_min"), (round(x / n_places, 4) for x in own), strict=True))
            for each, own in sums.items()
        }
        yield {"outputs": number + 1, "places": n_places, "acceptance": rows}


if __name__ == "__main__":
    main()
