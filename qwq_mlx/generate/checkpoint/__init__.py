"""A run on disk: its file, the form of its state, resuming and saving while it goes on."""
