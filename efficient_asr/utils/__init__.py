"""Ground that everything stands on: errors, files, processes, locks, seeds."""
