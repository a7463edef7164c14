"""Text normalisers, character labels of CTC models, and language codes."""
