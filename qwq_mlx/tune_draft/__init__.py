"""A draft model is trained on what the target wrote; `python -m qwq_mlx.tune_draft` does it."""
