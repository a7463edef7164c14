"""Inference: transcribers, language models, long audio."""
