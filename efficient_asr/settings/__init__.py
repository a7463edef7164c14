"""Settings: YAML files, the command line, limits."""
