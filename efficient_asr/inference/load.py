"""Load a transcriber from a model folder of this project or from a Whisper model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from efficient_asr.inference.long_audio import LongAudio
from efficient_asr.inference.transcriber import MANIFEST, Transcriber
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.backends import own_folder
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import is_adapter, local_config
from efficient_asr.models.sources import read_config, resolve_source
from efficient_asr.text.languages import is_language, normalise_or_keep
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.technique import find, merged

LM_OPTIONS = ("alpha", "beta", "beam_size", "case")
WHISPER_KEYS = ("long_audio", "overlap_s", "long_audio_batch", "encoder_padding", "padding_s", "quantise", "backend")


def load_transcriber(
    source: str | os.PathLike[str],
    lm_path: str | os.PathLike[str] | None = None,
    language: str | None = None,
    long_audio: str | None = "pauses",
    overlap_s: float | None = None,
    long_audio_batch: int | None = None,
    encoder_padding: float | str | None = None,
    padding_s: float | None = None,
    quantise: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Transcriber:
    """Load a transcriber from a model folder of this project, a Whisper directory, or the hub id of either.

    Arguments
    ---------
    source : str
        Model folder, directory or hub id.
    lm_path : str, optional
        Language model for CTC models, configured by `alpha`, `beta`, `beam_size` and `case` in `options`.
    language : str, optional
        Language of the audio (code or English name), for multilingual Whisper models. If None, it is detected; with
        `manifest`, it is read from each row.
    long_audio : str or None
        How to process audio longer than Whisper's window: `pauses`, `overlap` or `sequential`; None rejects such audio.
    overlap_s : float, optional
        Overlap of neighbouring windows in seconds, for `overlap`.
    long_audio_batch : int, optional
        Batch size for the pieces of one recording.
    encoder_padding : float or str, optional
        What a Whisper encodes behind the audio: a number for so many seconds of silence (30: the whole window), or the name of
        a technique that puts something in its place. By default what the model folder says, or 30.
    padding_s : float, optional
        Real silence in seconds, if `encoder_padding` is a name; by default what the model folder says, or 0.2.
    quantise : str, optional
        Compute parts of a Whisper with int8 weights on the CPU: `decoder-int8`, `encoder-int8`, `int8`, or the JSON file of a
        selection of layers by `scripts/search_int8.py`.
    backend : str, optional
        Engine that runs a Whisper: `torch`, `onnx` or `ctranslate2`. By default that of a converted model's folder, or torch.
        Any other model is converted first, and kept in a cache (`efficient_asr.models.backends`).
    **options
        For CTC models, see `lm_path`; for Whisper models, see `efficient_asr.models.whisper.decoding.DecodingOptions`, and
        `load_options` of `efficient_asr.utils.technique.Technique`: `assistant`, a smaller Whisper that proposes tokens.

    Raises
    ------
    UserError
        If `source` is not a supported model or an option does not apply to it.
    """
    source = model_source(source)
    is_whole_folder = os.path.isdir(source) and not is_adapter(source)
    config = read_config(own_folder(source)) if is_whole_folder else {}
    language = normalise_or_keep(language)
    speed = {"encoder_padding": encoder_padding, "padding_s": padding_s, "quantise": quantise, "backend": backend}
    options |= {key: value for key, value in speed.items() if value is not None}
    if config.get("format") == "efficient_asr":
        transcriber = _load_own(source, config, lm_path, language, options)
    else:
        if is_whole_folder and config.get("model_type") != "whisper":
            raise UserError(
                f"{source} is neither a model folder written by a recipe nor a Whisper model (model_type is "
                f"{config.get('model_type')!r}); fine-tune it first: python recipes/finetune_ctc/train.py ... --source {source}"
            )
        if lm_path:
            raise UserError("language model options require a CTC model; this is a Whisper model")
        transcriber = WhisperTranscriber.from_source(source, language, **options)
    if long_audio is None or transcriber.window_s is None:
        return transcriber
    if options.get("assistant") and long_audio_batch is None:
        long_audio_batch = 1  # it proposes tokens for one utterance at a time
    given = {"overlap_s": overlap_s, "batch_size": long_audio_batch}
    return LongAudio(transcriber, long_audio, **{key: value for key, value in given.items() if value is not None})


def whisper_keys(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `load_transcriber` in a YAML file, other than the language and those of DecodingOptions."""
    return {key: hparams[key] for key in (*WHISPER_KEYS, *merged("load_options")) if key in hparams}


def _load_own(
    source: str, config: dict[str, Any], lm_path: str | None, language: str | None, options: dict[str, Any]
) -> Transcriber:
    """Load a model folder of this project; techniques may register their own folder kinds."""
    kind = config.get("kind")
    load_kind = find("folder_kinds", str(kind)) if kind not in ("ctc", "ctc_onnx") else None
    if load_kind is not None:
        if lm_path:
            raise UserError(f"language model options require a CTC model; this is a '{kind}' model")

        def load_model(path: str, **more: Any) -> Transcriber:
            member = model_source(path)
            if local_config(member).get("kind") == kind:
                raise UserError(f"{source}: its member '{path}' is a '{kind}' model too, which is not supported")
            return load_transcriber(member, None, language, None, **more)

        return load_kind(source, load_model, language, options)
    unknown = [key for key in options if key not in LM_OPTIONS]
    if unknown:
        raise UserError(f"'{unknown[0]}' is not an option of CTC models; valid options: {', '.join(LM_OPTIONS)}")
    if language not in (None, MANIFEST) and not is_language(language):
        raise UserError(f"language: '{language}' is not a known language; use an ISO 639 code or an English name")
    # SpeechBrain's decoders and layers; a Whisper does not wait for their import
    from efficient_asr.inference.ctc import CTCTranscriber
    from efficient_asr.inference.language_model import LanguageModel
    from efficient_asr.models.ctc import CTCModel

    if kind == "ctc_onnx":
        from efficient_asr.models.interchange.onnx import OnnxCTC

        model = OnnxCTC(Path(source))
    else:
        model = CTCModel.load(source)
    lm = LanguageModel(resolve_source(lm_path), model.labels.vocabulary, **options) if lm_path else None
    return CTCTranscriber(model, lm)
