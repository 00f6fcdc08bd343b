"""Who guesses how rows go on: an automaton over texts (`ngram`), a small model (`model`), or both (`speculator`)."""
