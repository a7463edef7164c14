"""Shared evaluation: WER, MACs and runtime of any Transcriber."""
