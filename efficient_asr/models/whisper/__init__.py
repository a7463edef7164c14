"""Whisper as a recogniser."""
