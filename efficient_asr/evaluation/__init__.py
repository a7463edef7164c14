"""The shared measurement: WER, MACs and runtime of anything that turns audio into text."""
