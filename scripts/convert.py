"""Convert a checkpoint to packed MLX weights: the same as `python -m qwq_mlx.convert`, without installing anything."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.convert.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
