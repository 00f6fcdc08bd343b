"""Compare a conversion's first choices with the ids that llama.cpp writes greedily from the GGUF it was made of.

    python scripts/compare_llama_cpp.py FILE.gguf CONVERSION [--tokens N]

Needs the package xllamacpp (prebuilt llama.cpp). llama.cpp answers six questions; the conversion reads the same ids in
float32 and says at each place what it would have written, so that one difference does not make all later ones. Where
they differ, both margins are shown. llama.cpp rounds activations to 8 bits where weights are quantized: give it a GGUF
of the decoded weights in float32 to leave that out.

Does not: run on a GPU, or judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xllamacpp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwq_mlx.model.load import load_model  # noqa: E402 - the path must be set first

QUESTIONS = (
    "What is 12 * 7 + 5? Think step by step.",
    "Write a Python function that reverses a string.",
    "Name three primes above 50 and say why they are prime.",
    "Erkläre in zwei Sätzen, was Fotosynthese ist.",
    "How many r are in strawberry?",
    "List the first ten Fibonacci numbers.",
)


def main() -> int:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("conversion", type=Path)
    parser.add_argument("--tokens", type=int, default=60, help="of each answer (default: %(default)s)")
    options = parser.parse_args()
    model = load_model(options.conversion, compute_type="float32")
    prompts = [
        model.tokenizer.backend.encode(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).ids
        for question in QUESTIONS
    ]
    n_same = n_all = 0
    differences: list[float] = []
    for ids, answer in zip(prompts, answers(options.gguf, prompts, options.tokens), strict=True):
        theirs = [each["id"] for each in answer]
        ours = logprobs(model.module(mx.array([ids + theirs]), None)[0][len(ids) - 1 : -1])
        for place, (row, each) in enumerate(zip(ours, answer, strict=True)):
            first = int(row.argmax())
            n_all, n_same = n_all + 1, n_same + (first == each["id"])
            differences.append(abs(float(row[each["id"]]) - each["logprob"]))
            if first != each["id"]:
                margin = each["logprob"] - each["top_logprobs"][1]["logprob"]
                print(f"token {place}: ours by {row[first] - row[each['id']]:.3f} nats, llama.cpp's by {margin:.3f}")
    print(f"{n_same} of {n_all} tokens are the same; log-probabilities differ by {np.mean(differences):.2g} nats")
    return 0


def answers(path: Path, prompts: list[list[int]], n_tokens: int) -> list[list[dict[str, Any]]]:
    """llama.cpp's greedy tokens of each prompt: id, logprob and the two most likely."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 2048, 1, False, -1
    server = xllamacpp.Server(params)
    settings = {"n_predict": n_tokens, "temperature": 0, "top_k": 1, "n_probs": 2, "cache_prompt": False}
    replies = [server.handle_completions({"prompt": prompt, **settings}) for prompt in prompts]
    parsed = [json.loads(reply) if isinstance(reply, str) else reply for reply in replies]
    return [reply["choices"][0]["logprobs"]["content"] for reply in parsed]


def logprobs(logits: Any) -> np.ndarray:
    """(positions, ids) in float64."""
    values = np.array(logits).astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    sys.exit(main())
