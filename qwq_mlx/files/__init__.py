"""Bytes on disk and over the wire: safetensors headers, checkpoints, digests, manifests, atomic writes.

Does not: import MLX or know what a model is.
"""
