"""How tests start a command: with this checkout, and without PyTorch where it is installed.

Users have no PyTorch, and nothing but the tests' oracles needs it; transformers imports it where it finds it, which
takes 1.8 of the 4.3 CPU seconds of a short `python -m qwq_mlx.generate`.
"""

from __future__ import annotations

import os
from pathlib import Path

_TESTS = Path(__file__).resolve().parent

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS / "without_torch")])}
