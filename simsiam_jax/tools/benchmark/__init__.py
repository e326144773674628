"""Measures the speed of the input and of the training step."""
