"""Training: the loop, checkpoints, Brains, and the experiment runner."""
