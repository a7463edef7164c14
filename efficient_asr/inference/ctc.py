"""Transcriber for CTC models: greedy decoding, or beam search with a language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from efficient_asr.data import check_wavs
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel, greedy_texts


class CTCTranscriber(Transcriber):
    """Transcriber for a CTC model, with greedy decoding or a language model.

    Arguments
    ---------
    model : CTCModel
        The model; it is set to evaluation mode.
    language_model : LanguageModel, optional
        Language model for beam search; None decodes greedily.
    """

    def __init__(self, model: CTCModel, language_model: LanguageModel | None = None) -> None:
        self.model, self.language_model = model.eval(), language_model
        self.device = "cpu"

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch]."""
        wavs, wav_lens = check_wavs(wavs, wav_lens)
        with torch.no_grad():
            output = self.model.recognise(wavs.to(self.device), wav_lens.to(self.device))
        log_probs, frame_lengths = output.log_probs, output.frame_lengths
        if self.language_model is not None:
            texts = self.language_model.decode(log_probs, frame_lengths)
        else:
            texts = greedy_texts(log_probs, frame_lengths, self.model.labels)
        details = output.details or [{} for _ in texts]
        return [Transcript(text, entry) for text, entry in zip(texts, details, strict=True)]

    def to(self, device: str) -> CTCTranscriber:
        """Move to a device and return self."""
        self.model.to(device)
        self.device = device
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration of the model's parts."""
        return self.model.settings

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the techniques did over a whole benchmark."""
        return self.model.summary(records)
