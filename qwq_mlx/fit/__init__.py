"""Whether a model fits a machine's memory, and what would make it fit; `python -m qwq_mlx.fit` prints it."""
