"""A conversation at the terminal, its KV cache kept between turns; `python -m qwq_mlx.chat` holds it."""
