"""Checkpoints of runs, encoders and weight files."""
