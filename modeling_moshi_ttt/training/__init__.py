"""Training: settings, data, lanes, modes, the loop and its checkpoints. Knows of the model; the model knows nothing of it."""
