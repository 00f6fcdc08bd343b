"""Speed beside mlx-lm's on the same weights in one run; `python -m qwq_mlx.bench` prints it."""
