"""Training: configuration, state, step, loop, checkpoints, metrics, work directory and mesh."""
