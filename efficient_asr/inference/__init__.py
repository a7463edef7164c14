"""Inference: transcribers, language models and long audio."""
