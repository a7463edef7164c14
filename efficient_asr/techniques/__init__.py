"""Techniques: one module or package each, found by name; see `efficient_asr.utils.technique`."""
