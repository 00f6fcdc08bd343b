"""Checks of this package on the user's own machine, with a report for an issue: `python -m qwq_mlx.doctor`."""
