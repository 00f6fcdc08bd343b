"""Arrays to packed arrays: which bits where (`recipe`), how to choose them (`fit`), and what it cost (`measure`)."""
