"""A question becomes a trace: options, sampling, the one-token loop, text; `python -m qwq_mlx.generate` runs it."""
