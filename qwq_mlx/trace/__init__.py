"""One run as plain data: steps, the trace, its file and its plot; nothing here imports mlx."""
