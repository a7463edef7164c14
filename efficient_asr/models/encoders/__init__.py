"""Encoders, shown layer by layer."""
