"""Techniques for cheaper recognition: one idea from one paper a file, as plain torch modules and functions."""
