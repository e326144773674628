"""Runs the ablations and reports on them."""
