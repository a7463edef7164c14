"""Transcriber: anything that turns audio into text. Evaluation knows nothing else of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from efficient_asr.data import Row
from efficient_asr.inference.transcript import Transcript
from efficient_asr.utils.errors import UserError

MANIFEST = "manifest"  # as a language: what the line of each utterance says


class Transcriber:
    """Base class of all transcribers: what is asked of them, with defaults.

    A subclass needs `transcribe` only.

    Attributes
    ----------
    technique, label : str
        Technique and variant, for Results and tables.
    batched : bool
        Whether several utterances are computed together; otherwise only batch 1 is timed.
    takes_languages : bool
        Whether `transcribe` is given the language of each utterance.
    language : str or None
        Language of the audio as an ISO 639-1 code; None where it is detected or of no concern.
    languages : tuple of str
        Codes of the languages that may be chosen; empty where there is no choice.
    window_s : float or None
        Longest audio that `transcribe` takes, in seconds; None for any length.
    shows_encoder : bool
        Whether there are `encode` and `decode`.
    model : Any
        The network with its labels, where there is one.
    """

    technique: str = "none"
    label: str = "baseline"
    batched: bool = True
    takes_languages: bool = False
    language: str | None = None
    languages: tuple[str, ...] = ()
    window_s: float | None = None
    shows_encoder: bool = False
    model: Any = None

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time] at 16 kHz, on any device.
        wav_lens : torch.Tensor
            Relative lengths, [batch].
        languages : list of str or None, optional
            Of each utterance, where `takes_languages`.
        """
        raise NotImplementedError

    def encode(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Any:
        """First of two steps, where `shows_encoder`: run the encoder on [batch, time] with relative lengths [batch]."""
        raise UserError(f"{type(self).__name__} does not show its encoder")

    def decode(self, encoded: Any, languages: list[str | None] | None = None) -> list[Transcript]:
        """Second of two steps: search the texts in what `encode` returned."""
        raise UserError(f"{type(self).__name__} does not show its encoder")

    def encoder_shape(self) -> tuple[int, int, int]:
        """Return how many hidden states `encode` gives for each frame, their dimension, and the frames of a window."""
        raise UserError(f"{type(self).__name__} does not show its encoder")

    def transcribe_sequentially(self, wav: torch.Tensor, language: str | None = None) -> Transcript:
        """Transcribe long audio [time] window by window, each starting where the one before ended.

        Raises
        ------
        UserError
            Where the transcriber cannot.
        """
        raise UserError("long audio: only a plain Whisper transcribes sequentially; use pauses or overlap")

    @property
    def is_sequential(self) -> bool:
        """Whether there is `transcribe_sequentially`."""
        return type(self).transcribe_sequentially is not Transcriber.transcribe_sequentially

    def for_long_audio(self) -> Transcriber:
        """Return a transcriber of the same model for pieces of long audio."""
        return self

    def to(self, device: str) -> Transcriber:
        """Move to a device and return itself."""
        return self

    def parameters_count(self) -> int | None:
        """Number of weights; None where the transcriber does not say."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes its transcripts from those of others with the same weights, as plain data."""
        return {}

    def cost_key(self, transcript: Transcript) -> tuple | None:
        """Return what alone determines the MACs of a transcript; None where that is not known."""
        return None

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Refuse utterances that cannot be transcribed, before the first of them is."""

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the technique did over a whole benchmark, for `details` of the Result."""
        return {}


def transcribe_rows(
    transcriber: Transcriber, rows: list[Row], wavs: torch.Tensor, wav_lens: torch.Tensor
) -> list[Transcript]:
    """Transcribe utterances, [batch, time] with relative lengths [batch], in the languages of their rows where it matters."""
    if transcriber.takes_languages:
        return transcriber.transcribe(wavs, wav_lens, languages=[row.get("language") for row in rows])
    return transcriber.transcribe(wavs, wav_lens)
