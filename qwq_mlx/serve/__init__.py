"""An HTTP server for clients of OpenAI, Ollama and Anthropic: `python -m qwq_mlx.serve`."""
