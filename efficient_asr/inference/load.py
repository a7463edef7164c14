"""Loading anything that transcribes: model folders of this project, and Whispers."""

from __future__ import annotations

import os
from typing import Any

from efficient_asr.inference.ctc import CTCTranscriber
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.inference.long_audio import LongAudio
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.loading import is_adapter
from efficient_asr.models.sources import read_config, resolve_source
from efficient_asr.text.languages import is_language, normalise_or_keep
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import find

LM_OPTIONS = ("alpha", "beta", "beam_size", "case")


def load_transcriber(
    source: str | os.PathLike[str],
    lm_path: str | os.PathLike[str] | None = None,
    language: str | None = None,
    long_audio: str | None = "pauses",
    overlap_s: float | None = None,
    long_audio_batch: int | None = None,
    **options: Any,
) -> Transcriber:
    """Load a model folder of this project, a Whisper directory, or a Whisper hub id.

    Arguments
    ---------
    source : str
        The model.
    lm_path : str, optional
        Language model for CTC models; `alpha`, `beta`, `beam_size`, `case` go with it.
    language : str, optional
        Language of the audio (code or English name), for multilingual Whispers; detected where not given, and taken from the rows
        with `manifest`.
    long_audio : str or None
        How audio longer than a Whisper's window is cut: `pauses`, `overlap` or `sequential`; None refuses it.
    overlap_s : float, optional
        Seconds that neighbouring windows share with `overlap`.
    long_audio_batch : int, optional
        Pieces of one recording that are transcribed together.
    **options
        Of CTC models see `lm_path`; of Whispers see `efficient_asr.models.whisper.decoding.DecodingOptions`.

    Raises
    ------
    UserError
        Where `source` is no such model or an option does not go with it.
    """
    source = resolve_source(source)
    is_whole_folder = os.path.isdir(source) and not is_adapter(source)
    config = read_config(source) if is_whole_folder else {}
    language = normalise_or_keep(language)
    if config.get("format") == "efficient_asr":
        transcriber = _load_own(source, config, lm_path, language, options)
    else:
        if is_whole_folder and config.get("model_type") != "whisper":
            raise UserError(
                f"{source} is neither a model folder that a recipe left behind nor a Whisper (model_type is "
                f"{config.get('model_type')!r}); fine-tune it first: python recipes/finetune_ctc/train.py ... --source {source}"
            )
        if lm_path:
            raise UserError("language model options go with CTC models; this is a Whisper")
        transcriber = WhisperTranscriber.from_source(source, language, **options)
    if long_audio is None or transcriber.window_s is None:
        return transcriber
    given = {"overlap_s": overlap_s, "batch_size": long_audio_batch}
    return LongAudio(transcriber, long_audio, **{key: value for key, value in given.items() if value is not None})


def _load_own(
    source: str, config: dict[str, Any], lm_path: str | None, language: str | None, options: dict[str, Any]
) -> Transcriber:
    """Load a model folder of this project; techniques may have kinds of their own."""
    kind = config.get("kind")
    load_kind = find("folder_kinds", str(kind)) if kind != "ctc" else None
    if load_kind is not None:
        if lm_path:
            raise UserError(f"language model options go with CTC models; this is a {kind}")

        def load_model(path: str, **more: Any) -> Transcriber:
            return load_transcriber(path, None, language, None, **more)

        return load_kind(source, load_model, language, options)
    unknown = [key for key in options if key not in LM_OPTIONS]
    if unknown:
        raise UserError(f"'{unknown[0]}' is not an option of a CTC model ({', '.join(LM_OPTIONS)})")
    if language not in (None, MANIFEST) and not is_language(language):
        raise UserError(f"language: '{language}' is not a language")
    model = CTCModel.load(source)
    lm = LanguageModel(resolve_source(lm_path), model.labels.vocabulary, **options) if lm_path else None
    return CTCTranscriber(model, lm)
