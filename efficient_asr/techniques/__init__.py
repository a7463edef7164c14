"""Techniques, one module or package each, looked up by name; see `efficient_asr.utils.technique`."""
