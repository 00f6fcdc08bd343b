"""Products of few rows with 4-bit matrices on NVIDIA GPUs, where MLX's own kernels are slow."""
