"""Ids and logits: KV cache, sampler, logits processors, decoder and detokenizer; no question, no answer."""
