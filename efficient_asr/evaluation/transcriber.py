"""Transcriber: anything that turns audio into text. The evaluator knows nothing else of a model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from efficient_asr.data import Row, check_wavs
from efficient_asr.errors import UserError
from efficient_asr.evaluation.language_model import LanguageModel
from efficient_asr.evaluation.transcript import Transcript
from efficient_asr.languages import is_language, normalise_or_keep
from efficient_asr.models import read_config, resolve_source
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.models.loading import is_adapter

MANIFEST = "manifest"  # as a language: what the line of each utterance says


@runtime_checkable
class Transcriber(Protocol):
    """The contract between models and the evaluator.

    More members are used where a transcriber has them: `to(device)` moves it, `parameters_count()` says how many weights it
    has, `batched = False` says that it computes one utterance after the other, so that only batch 1 is timed,
    `takes_languages = True` that `transcribe` wants a third argument, `languages` [batch],
    `check_rows(rows, split)` refuses what cannot be transcribed, and `summary(records)` says what a technique did.
    """

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        """Transcribe `wavs` [batch, time] at 16 kHz with relative lengths `wav_lens` [batch], on any device."""


def transcribe_rows(
    transcriber: Transcriber, rows: list[Row], wavs: torch.Tensor, wav_lens: torch.Tensor
) -> list[Transcript]:
    """Transcribe utterances, [batch, time] with relative lengths [batch]; some are told the languages of their rows."""
    if getattr(transcriber, "takes_languages", False):
        return transcriber.transcribe(wavs, wav_lens, languages=[row.get("language") for row in rows])
    return transcriber.transcribe(wavs, wav_lens)


def move(transcriber: Transcriber, device: str) -> None:
    """Move a transcriber to a device if it can be moved."""
    getattr(transcriber, "to", lambda device: None)(device)


def parameters_count(transcriber: Transcriber) -> int | None:
    """Number of weights; None where the transcriber does not say."""
    return getattr(transcriber, "parameters_count", lambda: None)()


class CTCTranscriber:
    """Greedy or language-model decoding of a CTC model.

    Arguments
    ---------
    model : CTCModel
        The model, put into evaluation mode.
    language_model : LanguageModel, optional
        Decode with it instead of greedily.
    """

    batched = True

    def __init__(self, model: CTCModel, language_model: LanguageModel | None = None) -> None:
        self.model, self.language_model = model.eval(), language_model
        self.device = "cpu"

    def transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch]."""
        wavs, wav_lens = check_wavs(wavs, wav_lens)
        with torch.no_grad():
            reading = self.model.recognise(wavs.to(self.device), wav_lens.to(self.device))
        log_probs, frame_lengths = reading.log_probs, reading.frame_lengths
        if self.language_model is not None:
            texts = self.language_model.decode(log_probs, frame_lengths)
        else:
            texts = greedy_texts(log_probs, frame_lengths, self.model.labels)
        details = reading.details or [{} for _ in texts]
        return [Transcript(text, entry) for text, entry in zip(texts, details, strict=True)]

    def to(self, device: str) -> CTCTranscriber:
        """Move to a device and return itself."""
        self.model.to(device)
        self.device = device
        return self

    def parameters_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def fingerprint(source: str | Path) -> str:
    """Return a sum over the files of a model folder; of a hub id, the id."""
    if not os.path.isdir(source):
        return str(source)
    digest = hashlib.sha256()
    files = (p for p in Path(source).rglob("*") if p.suffix in (".json", ".safetensors", ".bin") and p.is_file())
    for path in sorted(files):
        digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


LM_OPTIONS = ("alpha", "beta", "beam_size", "case")


def load_transcriber(
    source: str | os.PathLike[str],
    lm_path: str | os.PathLike[str] | None = None,
    language: str | None = None,
    long_audio: str | None = "pauses",
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
    **options
        Of CTC models see `lm_path`; of Whispers, in a cascade too, see `models.decoding.DecodingOptions`.

    Raises
    ------
    UserError
        Where `source` is no such model or an option does not go with it.
    """
    source = resolve_source(source)
    local = os.path.isdir(source)
    adapter = is_adapter(source)
    config = read_config(source) if local and not adapter else {}
    language = normalise_or_keep(language)
    if config.get("format") == "efficient_asr" and config.get("kind") == "cascade":
        if lm_path:
            raise UserError("language model options go with CTC models; this is a cascade")
        from efficient_asr.evaluation.cascade import CascadeTranscriber

        if language == MANIFEST:
            raise UserError("language: a cascade takes one language, or detects it (null); not 'manifest'")
        decoding = config.get("decoding") or {}

        def load_model(path: str) -> Transcriber:
            return load_transcriber(path, None, language, None, **decoding | options)

        return _with_long_audio(CascadeTranscriber.load(source, load_model), long_audio)
    if config.get("format") == "efficient_asr":
        unknown = [key for key in options if key not in LM_OPTIONS]
        if unknown:
            raise UserError(f"'{unknown[0]}' is not an option of a CTC model ({', '.join(LM_OPTIONS)})")
        if language not in (None, MANIFEST) and not is_language(language):
            raise UserError(f"language: '{language}' is not a language")
        model = CTCModel.load(source)
        lm = LanguageModel(resolve_source(lm_path), model.labels.vocabulary, **options) if lm_path else None
        return CTCTranscriber(model, lm)
    if local and not adapter and config.get("model_type") != "whisper":
        raise UserError(
            f"{source} is neither a model folder that a recipe left behind nor a Whisper (model_type is "
            f"{config.get('model_type')!r}); fine-tune it first: python recipes/finetune_ctc/train.py ... --source {source}"
        )
    if lm_path:
        raise UserError("language model options go with CTC models; this is a Whisper")
    from efficient_asr.evaluation.whisper_decoding import WhisperTranscriber

    return _with_long_audio(WhisperTranscriber.from_source(source, language, **options), long_audio)


def _with_long_audio(transcriber: Any, method: str | None) -> Transcriber:
    """Let a transcriber that takes a window take longer audio."""
    from efficient_asr.evaluation.long_audio import LongAudio

    return LongAudio(transcriber, method) if method and transcriber.window_s else transcriber
