"""Models for and from other libraries: transformers, SpeechBrain, faster-whisper."""
