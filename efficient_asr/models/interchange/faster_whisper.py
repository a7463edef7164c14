"""Export a Whisper to CTranslate2, with the tokenizer and feature extractor files that faster-whisper needs."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from efficient_asr.models.whisper.model import Whisper
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

FILES = ("tokenizer.json", "preprocessor_config.json")


def export_to_faster_whisper(model: Whisper, folder: Path, quantization: str | None = None) -> None:
    """Write a folder for `faster_whisper.WhisperModel`.

    Arguments
    ---------
    model : Whisper
        A plain or fine-tuned Whisper.
    folder : Path
        The folder; written atomically.
    quantization : str, optional
        Number format of CTranslate2, such as `int8` or `float16`; None keeps float32.

    Raises
    ------
    UserError
        If CTranslate2 is not installed, or the model has layers that a plain Whisper does not have.
    """
    if type(model) is not Whisper:
        raise UserError(
            f"faster-whisper runs plain Whispers only, and this one has layers of the technique {model.technique}"
        )
    if importlib.util.find_spec("ctranslate2") is None:
        raise UserError("export to faster-whisper needs CTranslate2: pip install 'efficient_asr[ctranslate2]'")
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as plain, atomic_write(Path(folder)) as partial:
        source = Path(plain) / "model"
        model.save(source)
        TransformersConverter(str(source), copy_files=list(FILES)).convert(str(partial), quantization=quantization)
