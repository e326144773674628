"""Checkpoints of runs, encoders and files of weights."""
