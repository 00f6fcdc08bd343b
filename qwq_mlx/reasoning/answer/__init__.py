"""Thinking and answer told apart, and answers compared."""
