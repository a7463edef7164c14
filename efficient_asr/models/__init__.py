"""Models: encoders, heads, Whisper, and how they are saved and loaded."""
