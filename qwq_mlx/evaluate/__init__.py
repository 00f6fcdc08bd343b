"""What models solve: tasks answered, judged and compared; `python -m qwq_mlx.evaluate` does it."""
