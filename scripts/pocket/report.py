"""What ships beside the pocket model: README.md with recipe and accuracies, and the loss curve as a picture.

Every number comes from a file that another stage wrote (history.json of training, evaluation.json of scoring) or from
the code that used it; only the published figures of Tree of Thoughts are stated here, with their source.

Does not: train or score.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocket.data import KINDS

__all__ = ["write_readme"]

_NO_RECORD = (
    "Not shown: there is no record of a training run. Training (`--stage train`, then `--stage readme`) makes one."
)
_ANOTHER = (
    "It is a second run of this recipe with this seed, not the one whose weights ship, of which no record is left; a\n"
    "GPU does not add in the same order every time, so two runs need not end with the same bits."
)

# Yao et al. 2023, arXiv 2305.10601, table 2: GPT-4 on rows 901 to 1000 of the same list.
TREE_OF_THOUGHTS = (
    ("input-output prompt, GPT-4", "7.3 %"),
    ("chain of thought, GPT-4", "4.0 %"),
    ("chain of thought with self-consistency, k = 100, GPT-4", "9.0 %"),
    ("Tree of Thoughts, b = 1, GPT-4", "45 %"),
    ("Tree of Thoughts, b = 5, GPT-4", "74 %"),
)
GAME = "Game of 24, rows 901 to 1000"
PICTURE = "loss.svg"
RECORD = "training.json"


def write_readme(work: Path, folder: Path) -> None:
    """Write README.md and the picture into `folder`, from its evaluation.json and the record of training.

    The record is work/history.json, which is kept as folder/training.json; where `work` has none, the one kept before.
    """
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    history, record = work / "history.json", folder / RECORD
    if history.exists():
        told = json.loads(history.read_text(encoding="utf-8"))
        told["is_shipped"] = _is_shipped(work / "weights.pt", folder / "checkpoint")
        record.write_text(json.dumps(told) + "\n", encoding="utf-8")
    losses = _NO_RECORD
    if record.exists():
        told = json.loads(record.read_text(encoding="utf-8"))
        _draw(told, folder / PICTURE)
        losses = f"![loss and held-out problems solved over steps]({PICTURE})\n\n{_about_losses(told)}"
    (folder / "README.md").write_text(_text(losses, scores), encoding="utf-8")


def _is_shipped(weights: Path, checkpoint: Path) -> bool:
    """Whether these weights are those of the checkpoint, bit for bit."""
    import torch
    from safetensors.torch import load_file

    shipped = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    state: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    return state.keys() == shipped.keys() and all(torch.equal(state[name], shipped[name]) for name in state)


def _draw(history: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qwq_mlx"  # the same history gives the same bytes
    from matplotlib import pyplot

    steps, losses = [row[0] for row in history["losses"]], [row[1] for row in history["losses"]]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(steps, losses, color="#1f5fa8", linewidth=1.4)
    axes.set(yscale="log", xlabel="step (24 rows of 4,096 tokens)", ylabel="nats per learned token (line)")
    axes.grid(visible=True, which="both", linewidth=0.3)
    solved, scores = axes.twinx(), history["scores"]
    for marker, kind in zip("os^", ("parentheses", "letters", "arithmetic"), strict=True):
        shares = [100 * row[f"{kind} 4bit"] for row in scores]
        solved.plot([row["step"] for row in scores], shares, marker, color="#b04a2f", markersize=4, label=kind)
    solved.set(ylim=(0, 103), ylabel="% of traces right, 4 bits (dots)")
    solved.legend(loc="center")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _text(losses: str, scores: dict[str, Any]) -> str:
    from pocket.model import CONFIG
    from pocket.train import Plan

    config, plan = CONFIG, asdict(Plan())
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in plan.items())
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in KINDS.items())
    return f"""# The pocket model: a reasoner small enough to ship

6,594,816 parameters in bfloat16 (13.2 MB), Qwen2 architecture, laid out file by file as QwQ-32B-Preview is. It thinks
aloud and answers under `**Final Answer**` in `\\boxed{{}}`, without `<think>` tags. It adds one pair of parentheses to
make an equation true, counts a letter in a word, does plain arithmetic with two or three numbers, and plays the Game of
24; asked anything else it says that it is only a pocket model and what it can do. It knows nothing else.

## Accuracy

Held-out problems, scored in MLX by an evaluator that parses the answer itself (`qwq_mlx.pocket.problems`); any right
answer counts. Greedy unless T = 0.7 is named (then top-p 0.8, top-k 20 of generation_config.json, one sample each).
4-bit is this project's conversion with the recipe `pocket-4bit`; its codes are unpacked to the same numbers in float32
before scoring, since MLX's CPU backend multiplies a batch of rows by floats about 30 times faster than by codes.

{_accuracies(scores)}

Command: `python scripts/train_pocket.py --work FOLDER --stage evaluate --game24 24.csv` (24.csv is the list of
princeton-nlp/tree-of-thought-llm, MIT; without it the Game of 24 is left out).

### The Game of 24 beside Tree of Thoughts

{_games(scores)}

What differs: GPT-4 is a general model that was prompted with a few examples; this one was trained for the task on
puzzles with other numbers (the 100 rows, and a quarter of all number multisets, are held out by a hash), and it writes
a plain search with at most five first moves into one output. The rows say how well the task is learned, not that a
6.6 M model reasons as GPT-4 does.

## Recipe

`python scripts/train_pocket.py --work FOLDER` (needs `pip install ".[train]"` and one GPU).

- Data: {shares}, drawn and solved by `scripts/pocket/data.py` from a
  seed; held-out problems are disjoint by the hash of their canonical form (`tests/pocket/test_problems.py`), and the
  founding article's expression is never in training, with any target. Every trial restates the target beside its
  result, which makes the verdict a local comparison.
- Tokenizer: Qwen2's pipeline with {config["vocab_size"]} rows (256 bytes, 304 merges, ChatML tokens, padding).
- Model: {config["num_hidden_layers"]} layers, width {config["hidden_size"]}, {config["num_attention_heads"]} heads,
  {config["num_key_value_heads"]} key/value heads, MLP {config["intermediate_size"]}, 4,096 positions.
- Training: {settings}.
  AdamW (0.9, 0.95), cosine, gradient clipped at 1, loss on the assistant's text alone, packed rows of 4,096 tokens; in
  the last {1 - plan["quantized_from"]:.0%} every other step computes with weights on the 4-bit
  grid. Weights are chosen by held-out problems solved, with full and 4-bit weights, never by loss.

## Loss

{losses}
"""


def _accuracies(scores: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    lines = ["| problems | n | bf16 | 4-bit | mean tokens |", "|---|---|---|---|---|"]
    for name in names:
        found = [scores.get(weights, {}).get(name) for weights in ("bf16", "4-bit")]
        solved = ["not measured" if each is None else f"{each['solved'] / each['n']:.1%}" for each in found]
        first = next(each for each in found if each is not None)
        lines.append(f"| {name} | {first['n']} | {solved[0]} | {solved[1]} | {first['mean_tokens']:,.0f} |")
    return "\n".join(lines)


def _games(scores: dict[str, Any]) -> str:
    lines = ["| rows 901 to 1000 | solved |", "|---|---|"]
    for name in (GAME, f"{GAME}, T = 0.7"):
        for weights in ("bf16", "4-bit"):
            found = scores.get(weights, {}).get(name)
            if found is not None:
                lines.append(
                    f"| pocket model, {weights}{name.removeprefix(GAME)} | {found['solved'] / found['n']:.0%} |"
                )
    return "\n".join([*lines, *(f"| {name} (published) | {share} |" for name, share in TREE_OF_THOUGHTS)])


def _about_losses(history: dict[str, Any]) -> str:
    last, planned = history["losses"][-1], history["plan"]["steps"]
    whole = "" if last[0] >= planned - 100 else ", where the run was cut off"
    text = f"{last[0]:,} of {planned:,} steps{whole}; {last[2]:,.0f} s on one H100; the last loss is {last[1]:.2g}."
    if history["scores"]:
        best = history["scores"][-1]
        shares = ", ".join(f"{kind} {best[f'{kind} 4bit']:.1%}" for kind in ("parentheses", "letters", "arithmetic"))
        text += f"\nHeld-out traces right to the last id at step {best['step']:,}, with 4-bit weights: {shares}."
    return text if history["is_shipped"] else f"{text}\n{_ANOTHER}"
