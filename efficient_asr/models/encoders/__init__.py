"""Encoders that expose their layers."""
