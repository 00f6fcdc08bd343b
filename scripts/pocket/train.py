"""Train the pocket model on one GPU: packed rows, bfloat16 autocast, AdamW with a cosine, in minutes.

What counts is solved problems: the loss looks finished thousands of steps before the verdicts are right. The weights
are therefore scored several times in the last half of training, with full and with 4-bit weights, by the share of
held-out problems whose whole trace greedy decoding would write (every one of its ids is the likeliest, which one pass
shows); the best of those weights are kept.

Does not: export to the package's layout (export.py) or give the accuracies that are published (evaluate.py, in MLX).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pocket import data, packing
from pocket.model import CONFIG, PocketModel
from pocket.quantization import quantized_weights

__all__ = ["Plan", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how: the whole recipe besides data.py and model.py.

    reuse: how many steps see a row on average. quantized_from: the share of steps after which every other one
    computes with 4-bit weights. scores: how often held-out problems are solved in the last half.
    """

    steps: int = 17_000
    rows_per_step: int = 24
    learning_rate: float = 1.5e-3
    final_rate: float = 0.01
    warmup_steps: int = 300
    weight_decay: float = 0.1
    reuse: float = 2.0
    quantized_from: float = 0.6
    scores: int = 6
    n_scored: int = 128
    n_workers: int = 15
    seed: int = 1


def _batches(encoder_folder: Path, system_prompt: str, plan: Plan) -> Iterator[NDArray[np.uint16]]:
    """Rows drawn at random from a window of recent blocks, which moves on as blocks are used up."""
    rng = np.random.default_rng(plan.seed)
    source = packing.blocks(encoder_folder, system_prompt, seed=plan.seed, n_workers=plan.n_workers)
    window = np.concatenate([next(source) for _ in range(2 * plan.n_workers)])
    oldest, owed = 0, 0.0
    while True:
        yield window[rng.integers(len(window), size=plan.rows_per_step)]
        owed += plan.rows_per_step / plan.reuse / packing.ROWS_PER_BLOCK
        while owed >= 1:
            block = next(source)
            window[oldest : oldest + len(block)] = block
            oldest, owed = (oldest + len(block)) % len(window), owed - 1


def _loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats per learned token of rows (n, ROW_TOKENS + 1)."""
    ids = rows & (packing.LEARN - 1)
    targets = torch.where(rows >= packing.LEARN, ids, -100)[:, 1:]
    logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def _held_out_rows(encoder: packing.Encoder, n: int) -> dict[str, torch.Tensor]:
    """Problems with one right trace, a row each: {kind: (n, ROW_TOKENS + 1)}."""
    found = {}
    for kind, size in (("parentheses", 9), ("letters", None), ("arithmetic", None)):
        rows = torch.full((n, packing.ROW_TOKENS + 1), encoder.padding_id, dtype=torch.long)
        for row, problem in zip(rows, data.held_out_problems(kind, n, seed=2, n=size), strict=True):
            trace = data.solve(problem, random.Random(0))
            document = encoder.document(
                [{"role": "user", "content": problem.question}, {"role": "assistant", "content": trace}]
            )
            row[: len(document)] = torch.tensor(document)
        found[kind] = rows
    return found


@torch.no_grad()
def _score(model: PocketModel, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of rows whose every learned id is the likeliest, by kind, with full and with 4-bit weights."""
    device = model.lm_head.weight.device
    found = {}
    for name in ("bf16", "4bit"):
        with quantized_weights(model) if name == "4bit" else nullcontext():
            for kind, rows in held_out.items():
                right = 0
                for row in rows.to(device).split(8):
                    likeliest = model(row[:, :-1] & (packing.LEARN - 1)).argmax(-1)
                    learned = row[:, 1:] >= packing.LEARN
                    right += int(((likeliest == row[:, 1:] - packing.LEARN) | ~learned).all(-1).sum())
                found[f"{kind} {name}"] = right / len(rows)
    return found


def _rate(step: int, plan: Plan) -> float:
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.final_rate + (1 - plan.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def train(plan: Plan, encoder_folder: Path, system_prompt: str, output: Path) -> None:
    """Train; `output` gets weights.pt (the best scored, bfloat16) and history.json (plan, losses, scores)."""
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    output.mkdir(parents=True, exist_ok=True)
    encoder = packing.Encoder(encoder_folder, system_prompt)
    held_out = _held_out_rows(encoder, plan.n_scored)
    model = PocketModel().to(device)
    compiled: Any = torch.compile(_loss) if cuda else _loss
    decayed = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=cuda)
    scored_at = {plan.steps - round(index * plan.steps * 0.5 / plan.scores) for index in range(plan.scores)}
    history: dict[str, Any] = {"plan": asdict(plan), "config": CONFIG, "losses": [], "scores": []}
    best, started, learned = -1.0, time.monotonic(), torch.zeros((), device=device)
    for step, rows in zip(range(1, plan.steps + 1), _batches(encoder_folder, system_prompt, plan), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _rate(step - 1, plan)
        batch = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        quantized = step > plan.quantized_from * plan.steps and step % 2 == 0
        with quantized_weights(model) if quantized else nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        learned += loss.detach()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            history["losses"].append([step, float(learned) / 100, round(seconds, 1)])
            learned.zero_()
            mean = history["losses"][-1][1]
            rate = step * plan.rows_per_step * packing.ROW_TOKENS / seconds / 1e6
            left = seconds / step * (plan.steps - step)
            print(f"step {step:,} loss {mean:.5f} {rate:.2f} M tok/s, {left:.0f} s left", flush=True)
            (output / "history.json").write_text(json.dumps(history), encoding="utf-8")  # kept if the run is cut off
        if step in scored_at:
            scores = _score(model, held_out)
            history["scores"].append({"step": step, **scores})
            print(json.dumps(history["scores"][-1]), flush=True)
            if sum(scores.values()) >= best:
                best, history["best"] = sum(scores.values()), step
                state = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
                torch.save(state, output / "weights.pt")
            (output / "history.json").write_text(json.dumps(history), encoding="utf-8")
