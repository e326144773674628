"""The training step: mesh, state, optimizer, accumulation and the metrics of collapse."""
