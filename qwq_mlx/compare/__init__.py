"""Several forms of one model side by side, size beside loss; `python -m qwq_mlx.compare A B` prints it."""
