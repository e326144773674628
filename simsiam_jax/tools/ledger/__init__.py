"""Runs of the ablations and their table."""
