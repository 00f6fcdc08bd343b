"""Make the bundled pocket model: tokenizer, training, export, evaluation, README; each stage alone or all in turn.

    python scripts/train_pocket.py --work FOLDER [--stage STAGE] [--steps N] [--game24 CSV]

Training wants one GPU (about 15 minutes on an H100 or H200); the other stages run anywhere. Needs `pip install
".[train]"`. The stages read and write `--work` (weights, history) and qwq_mlx/pocket/ (what ships).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

STAGES = ("vocabulary", "train", "export", "evaluate", "readme")


def main() -> None:
    """Parse, then run the stages in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights.pt and history.json")
    parser.add_argument("--stage", choices=STAGES, help="one stage instead of all in turn")
    parser.add_argument("--steps", type=int, help="training steps, where the plan's number is too many")
    parser.add_argument("--game24", type=Path, help="Tree of Thoughts' table 24.csv, to score its rows 901 to 1000")
    args = parser.parse_args()
    for stage in [args.stage] if args.stage else STAGES:
        run(stage, args.work, args.steps, args.game24)


def run(stage: str, work: Path, steps: int | None, game24: Path | None) -> None:
    """One stage. Imports come late: the vocabulary needs no PyTorch, evaluation no GPU."""
    from qwq_mlx.facts import POCKET
    from qwq_mlx.pocket import FOLDER

    if POCKET.system_prompt is None:
        raise SystemExit("facts.POCKET has no system prompt; the template writes one, so state it there")
    if stage == "vocabulary":
        from pocket import vocabulary

        vocabulary.write(vocabulary.train(seed=1), FOLDER)
    elif stage == "train":
        from pocket.train import Plan, train

        train(Plan() if steps is None else Plan(steps=steps), FOLDER, POCKET.system_prompt, work)
    elif stage == "export":
        from pocket.export import export

        export(work / "weights.pt", FOLDER)
    elif stage == "evaluate":
        from pocket.evaluate import evaluate

        evaluate(FOLDER, FOLDER.parent / "evaluation.json", game24_table=game24)
    else:
        from pocket.report import write_readme

        write_readme(work, FOLDER.parent)


if __name__ == "__main__":
    main()
