"""GGUF files as a source: a checked header, and a checkpoint with the tensor names of the Hub in front of it."""
