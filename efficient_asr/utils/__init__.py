"""Base utilities: errors, files, processes, locks, seeds."""
