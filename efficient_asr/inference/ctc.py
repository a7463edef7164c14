"""CTC models as transcribers: greedy decoding, or beam search with a language model."""

from __future__ import annotations

from typing import Any

import torch

from efficient_asr.data import check_wavs
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel, greedy_texts


class CTCTranscriber(Transcriber):
    """Greedy or language-model decoding of a CTC model.

    Arguments
    ---------
    model : CTCModel
        The model, put into evaluation mode.
    language_model : LanguageModel, optional
        Decode with it instead of greedily.
    """

    def __init__(self, model: CTCModel, language_model: LanguageModel | None = None) -> None:
        self.model, self.language_model = model.eval(), language_model
        self.device = "cpu"

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list[str | None] | None = None
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
        """Move to a device and return itself."""
        self.model.to(device)
        self.device = device
        return self

    @property
    def technique(self) -> str:
        """Techniques in the model."""
        return self.model.technique

    @property
    def label(self) -> str:
        """What the techniques call their settings."""
        return self.model.label

    @property
    def settings(self) -> dict[str, Any]:
        """The parts of the model."""
        return self.model.settings

    def parameters_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())
