"""CTC models for and from other libraries: transformers, SpeechBrain, ONNX."""
