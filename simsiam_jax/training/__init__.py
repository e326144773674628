"""How a step runs: mesh, step, optimizer, checkpoints, measures, logs."""
