"""Loops in a text, noticed while it is written."""
