"""Record greedy ids on the CPU with the margins that they had: after a new pocket model, or for the tests of real ones.

python scripts/record_greedy_ids.py                                     the bundled model's, for doctor
python scripts/record_greedy_ids.py MODEL=FOLDER ... --output FILE      other models', as one JSON object
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.default_model import pocket_model, ready_model
from qwq_mlx.doctor import recorded
from qwq_mlx.model.load import load_model


def main() -> None:
    """Load each model, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL=FOLDER", help="(default: the bundled model)")
    parser.add_argument("--output", type=Path, help="file to write (default: doctor's own)")
    options = parser.parse_args()
    if bool(options.models) != (options.output is not None):
        parser.error("models and --output go together")
    mx.set_default_device(mx.cpu)  # type: ignore[arg-type]
    if not options.models:
        write(Path(recorded.__file__).with_name("recorded_ids.json"), record(Path(ready_model(pocket_model()))))
        return
    folders = dict(each.split("=", 1) for each in options.models)
    write(options.output, {model: record(Path(folder)) for model, folder in folders.items()})


def record(folder: Path) -> dict[str, Any]:
    """What `doctor.recorded.record` gives of the model in a folder."""
    content = recorded.record(load_model(folder, compute_type="float32"))
    sys.stderr.write(f"{folder}: {len(content['ids'])} ids, the smallest margin is {min(content['margins'])}\n")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """One line of JSON."""
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
