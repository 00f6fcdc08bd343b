"""A file of questions, answered one after another into a file of results."""
