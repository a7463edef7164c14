"""Table of models trained with audio_context against the padded original."""

from __future__ import annotations

from pathlib import Path

from efficient_asr.techniques.silence_cache import report


def comparison_table(name: str, results_folder: Path) -> str:
    """Return the table for the marker `<!-- audio_context NAME -->`, from `audio_context/NAME.json`."""
    return report.comparison_table(name, results_folder, "audio_context")
