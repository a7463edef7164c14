"""Transcriber: the interface of everything that turns audio into text, and the only one that evaluation uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from efficient_asr.data import Row
from efficient_asr.inference.transcript import Transcript
from efficient_asr.utils.errors import UserError

MANIFEST = "manifest"  # as a language: use the language given in each manifest line


class Transcriber:
    """Base class of all transcribers: their interface, with defaults.

    Subclasses only need to implement `transcribe`.

    Attributes
    ----------
    batched : bool
        Whether several utterances can be processed in one batch; otherwise only batch size 1 is timed.
    takes_languages : bool
        Whether `transcribe` must be given the language of each utterance.
    language : str or None
        Language of the audio as an ISO 639-1 code; None if it is detected or irrelevant.
    languages : tuple of str
        Codes of the supported languages; empty if there is no choice.
    window_s : float or None
        Maximum duration that `transcribe` accepts, in seconds; None if there is no limit.
    shows_encoder : bool
        Whether `encode` and `decode` are available.
    model : Any
        The network with its labels, if there is one.
    """

    batched: bool = True
    takes_languages: bool = False
    language: str | None = None
    languages: tuple[str, ...] = ()
    window_s: float | None = None
    shows_encoder: bool = False
    model: Any = None

    @property
    def technique(self) -> str:
        """Technique of `model`, for Results and tables; `none` without one."""
        return "none" if self.model is None else self.model.technique

    @property
    def label(self) -> str:
        """Variant of `model`, for Results and tables; `baseline` without one."""
        return "baseline" if self.model is None else self.model.label

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
            Language of each utterance, if `takes_languages`.
        """
        raise NotImplementedError

    def encode(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor,
        hidden_states: bool = False,
        languages: list[str | None] | None = None,
    ) -> Any:
        """Run the encoder on [batch, time] with relative lengths [batch]: the first of two steps, if `shows_encoder`."""
        raise UserError(f"{type(self).__name__} does not expose its encoder")

    def decode(self, encoded: Any, languages: list[str | None] | None = None) -> list[Transcript]:
        """Decode the output of `encode` to text: the second of two steps."""
        raise UserError(f"{type(self).__name__} does not expose its encoder")

    def encoder_shape(self) -> tuple[int, int, int]:
        """Return the number of hidden states per frame that `encode` returns, their dimension, and the frames per window."""
        raise UserError(f"{type(self).__name__} does not expose its encoder")

    def transcribe_sequentially(self, wav: torch.Tensor, language: str | None = None) -> Transcript:
        """Transcribe long audio [time] window by window, each starting where the previous one ended.

        Raises
        ------
        UserError
            If the transcriber does not support this.
        """
        raise UserError("long audio: only a plain Whisper model supports sequential decoding; use pauses or overlap")

    @property
    def is_sequential(self) -> bool:
        """Whether `transcribe_sequentially` is implemented."""
        return type(self).transcribe_sequentially is not Transcriber.transcribe_sequentially

    def for_long_audio(self) -> Transcriber:
        """Return a transcriber of the same model for the pieces of long audio."""
        return self

    def to(self, device: str) -> Transcriber:
        """Move to a device and return self."""
        return self

    def parameters_count(self) -> int | None:
        """Return the number of weights of `model`; None if it is unknown."""
        if not isinstance(self.model, torch.nn.Module):
            return None
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that affect the transcripts, other than the weights, as plain data."""
        return {}

    def cost_key(self, transcript: Transcript) -> tuple | None:
        """Return a key such that transcripts with equal keys cost equal MACs; None if no such key is known."""
        return None

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Reject utterances that cannot be transcribed, before the first one is processed."""

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Summarise the technique's decisions over a whole benchmark, for `details` of the Result."""
        return {}


def transcribe_rows(
    transcriber: Transcriber, rows: list[Row], wavs: torch.Tensor, wav_lens: torch.Tensor
) -> list[Transcript]:
    """Transcribe utterances, [batch, time] with relative lengths [batch]; pass the rows' languages if `takes_languages`."""
    if transcriber.takes_languages:
        return transcriber.transcribe(wavs, wav_lens, languages=[row.get("language") for row in rows])
    return transcriber.transcribe(wavs, wav_lens)
