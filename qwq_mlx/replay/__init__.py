"""A receipt is run again and compared, id by id; `python -m qwq_mlx.replay` is the command."""
