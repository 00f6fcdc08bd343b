"""Hold streamed text against the tokenizer's own decoding: random id lists and every id alone.

    python scripts/stream_lists.py TOKENIZER_FOLDER [--lists 100000] [--seed 0]

Prints how many lists differ, and the first of them; exits 1 if any does. Also times 32,768 undecodable bytes.
Does not: need a model's weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.engine.detokenizer import Pieces, TextStream
from qwq_mlx.model.tokenizer import load_tokenizer


def streamed(pieces: Pieces, ids: list[int]) -> str:
    """The text as a run shows it, id by id."""
    stream = TextStream(pieces)
    return "".join(stream.feed(token_id) for token_id in ids) + stream.finish()


def main() -> int:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--lists", type=int, default=100_000, help="random id lists (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the lists (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.folder, vocab_size=152_064)
    pieces, rng = Pieces(tokenizer), random.Random(options.seed)
    lists = [[token_id] for token_id in range(pieces.n_ids)]
    lists += [[rng.randrange(pieces.n_ids) for _ in range(rng.randint(1, 24))] for _ in range(options.lists)]
    decode = tokenizer.hf.backend_tokenizer.decode
    differing = [ids for ids in lists if streamed(pieces, ids) != decode(ids, skip_special_tokens=False)]
    print(f"{len(differing)} of {len(lists):,} lists differ" + (f", the first: {differing[0]}" if differing else ""))
    lone = next(token_id for token_id in range(pieces.n_ids) if pieces[token_id] == b"\x80")
    start = time.process_time()
    n_shown = len(streamed(pieces, [lone] * 32_768))
    print(f"32,768 undecodable ids: {n_shown:,} characters in {time.process_time() - start:.3f} s of CPU")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
