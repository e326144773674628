"""How a step runs: mesh, step, optimiser, checkpoints, measures, logs."""
