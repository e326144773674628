"""Checks a run before it starts."""
