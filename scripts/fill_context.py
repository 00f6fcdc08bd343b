"""Fill a context to its last position: prompts up to, at and beyond it, and one run from a short prompt to its end.

    python scripts/fill_context.py [--context 32768]

The model is a tiny random one (2 layers) with QwQ-32B-Preview's 32,768 positions. The long run is judged by an oracle:
all its ids are fed again as one prompt, without the run's cache, and the log-probability of each id must be the one
that the run told when it drew it. Prints one JSON object; exit code 1 where something is not as promised.

Does not: show what a trained model says at such a length, or measure speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import write_tiny_checkpoint  # noqa: E402 - the paths must be set first

from qwq_mlx.errors import OptionError, PromptError  # noqa: E402
from qwq_mlx.generate.reasoner import Reasoner, load  # noqa: E402
from qwq_mlx.options import Sampling, Thinking  # noqa: E402
from qwq_mlx.trace.trace import Trace  # noqa: E402

_TOLERANCE = 1e-3  # nats; the oracle's passes are of other sizes than the run's
_CHUNK = 512  # ids of the oracle's passes; the run itself takes 2,048 of a prompt and then one by one


def main() -> int:
    """Parse, fill, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32_768, help="positions of the model (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_checkpoint(
            Path(folder) / "checkpoint",
            hidden_size=32,
            intermediate_size=48,
            n_heads=2,
            n_kv_heads=1,
            max_position_embeddings=options.context,
        )
        found = filled(load(model), save_at=Path(folder) / "run")
    print(json.dumps(found, indent=1))
    return 0 if found["is_as_promised"] else 1


def filled(reasoner: Reasoner, *, save_at: Path) -> dict[str, Any]:
    """What happens at the model's last positions. save_at: a file for the run that is full."""
    context = reasoner.model.config.max_position_embeddings
    n_around = len(reasoner.stream("7").request.prompt_ids) - 1
    prompts: dict[str, Any] = {}
    for n_prompt in (context - 2, context - 1, context, context + 1):
        _tell(f"a prompt of {n_prompt:,} ids")
        try:
            trace = _run(reasoner, "7" * (n_prompt - n_around))
        except PromptError as error:
            prompts[f"{n_prompt}"] = str(error)
            continue
        prompts[f"{n_prompt}"] = f"{len(trace.ids)} ids, {trace.finish_reason}"
    start = time.perf_counter()
    run = reasoner.stream("7", sampling=_sampling(reasoner), thinking=Thinking(on_loop="off"))
    for step in run:
        if step.index % 2048 == 0:
            _tell(f"{step.index:,} of {context - n_around - 1:,} ids, {time.perf_counter() - start:.0f} s")
    trace = run.trace()
    run.save(save_at)
    try:
        reasoner.resume(save_at)
        refused = ""
    except OptionError as error:
        refused = str(error)
    _tell("feeding all ids again")
    error, n_checked = _differences(reasoner, trace)
    n_ids = len(trace.prompt_ids) + len(trace.ids)
    return {
        "context": context,
        "prompts": prompts,
        "run": f"{len(trace.prompt_ids)} + {len(trace.ids)} ids, {trace.finish_reason}, {trace.detail}",
        "resume": refused,
        "seconds": round(time.perf_counter() - start, 1),
        "logprobs_checked": n_checked,
        "largest_difference": error,
        "is_as_promised": (trace.finish_reason, n_ids) == ("context_full", context)
        and prompts[f"{context - 2}"] == "2 ids, context_full"
        and prompts[f"{context - 1}"] == "1 ids, context_full"
        and all("must hold at least one more" in prompts[f"{each}"] for each in (context, context + 1))
        and "Give more to go on" in refused
        and error <= _TOLERANCE,
    }


def _sampling(reasoner: Reasoner) -> Sampling:
    """Random ids and never the end of the text."""
    return Sampling(
        temperature=1.0, top_k=0, top_p=1.0, seed=1, logit_bias=dict.fromkeys(reasoner.model.stop_ids, -math.inf)
    )


def _run(reasoner: Reasoner, question: str) -> Trace:
    return reasoner.generate(question, sampling=_sampling(reasoner))


def _differences(reasoner: Reasoner, trace: Trace) -> tuple[float, int]:
    """The largest difference between a run's log-probabilities and those of all its ids fed again, and their number."""
    from mlx_lm.models.cache import KVCache

    module, n_ids = reasoner.model.module, reasoner.model.tokenizer.n_ids
    ids = [*trace.prompt_ids, *trace.ids]
    cache = [KVCache() for _ in module.layers]
    found: list[float] = []
    for at in range(0, len(ids) - 1, _CHUNK):
        fed, following = ids[at : at + _CHUNK], mx.array(ids[at + 1 : at + _CHUNK + 1])
        logits = module(mx.array([fed]), cache=cache)[0, : following.size, :n_ids].astype(mx.float32)
        chosen = mx.take_along_axis(logits, following[:, None], axis=1)[:, 0]
        found += (chosen - mx.logsumexp(logits, axis=1)).tolist()  # type: ignore[arg-type] # a list of floats
    expected = [value for value in trace.logprobs if value is not None]
    return max(abs(a - b) for a, b in zip(found[-len(expected) :], expected, strict=True)), len(expected)


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
