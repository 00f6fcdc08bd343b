"""Reading a model's reasoning while it is written: thinking and answer apart, loops, languages, a budget.

Each part is a small state machine that is fed one token's text at a time and does constant work per token.

Does not: import mlx or transformers, hold a model, or change what is generated; `qwq_mlx.generate` acts on it.
"""
