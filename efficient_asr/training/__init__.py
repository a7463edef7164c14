"""Training: the loop, checkpoints, Brains, and the run of an experiment."""
