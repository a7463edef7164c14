"""efficient_asr: make speech recognition cheaper, and know exactly what it costs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from efficient_asr.utils.torchaudio_compat import ensure_importable

if TYPE_CHECKING:
    from efficient_asr.inference.transcriber import Transcriber

__version__ = "0.1.0"

ensure_importable()


def load_transcriber(source: str | os.PathLike[str], **options) -> Transcriber:
    """Load a transcriber from a model folder, a Whisper directory or the Hugging Face Hub.

    Arguments
    ---------
    source : str or Path
        A model folder written by a recipe (`<output_folder>/model`), a Whisper directory, or the Hub id of either.
    **options
        Passed to the transcriber, for example `lm_path`, `alpha`, `beta`, `beam_size` for CTC models and `language`
        for Whisper.

    Returns
    -------
    Transcriber
        Call `.transcribe(wavs, wav_lens)`.

    Raises
    ------
    UserError
        If `source` is not such a model.
    """
    from efficient_asr.inference.load import load_transcriber as load

    return load(source, **options)
