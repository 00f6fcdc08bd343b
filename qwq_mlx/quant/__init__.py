"""Arrays to packed arrays: which bits where (`recipe`), how to choose them (`fit`), and what it cost (`measure`)."""

DEFAULT_RECIPE = "qwq-32b-preview-4bit"
"""Name of the recipe that is used unless another is asked for; here, so that --help need not import numpy."""
