"""Record the bundled model's greedy ids on the CPU as qwq_mlx/doctor/recorded_ids.json: after a new pocket model.

python scripts/record_doctor_ids.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

from qwq_mlx.default_model import pocket_model, ready_model
from qwq_mlx.doctor import recorded
from qwq_mlx.model.load import load_model

if __name__ == "__main__":
    mx.set_default_device(mx.cpu)  # type: ignore[arg-type]
    model = load_model(ready_model(pocket_model()), compute_type="float32")
    content = recorded.record(model)
    Path(recorded.__file__).with_name("recorded_ids.json").write_text(json.dumps(content) + "\n")
    sys.stderr.write(f"{len(content['ids'])} ids, the smallest margin is {min(content['margins'])}\n")
