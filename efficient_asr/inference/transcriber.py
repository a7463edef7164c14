"""Transcriber: the interface of everything that turns audio into text, and the only one that evaluation uses."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from efficient_asr.data import Row, from_samples, load_audio, pad_wavs
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
    normaliser : str or None
        Normaliser for scoring, if none is chosen; None for Whisper's own, which depends on the language (see `Benchmark`).
    shows_encoder : bool
        Whether `encode` and `decode` are available.
    counts_macs : bool
        Whether its multiply-accumulates can be counted: not those of engines outside of PyTorch.
    thop_counts : bool
        Whether thop knows all layers of the model, so that its count means something.
    model : Any
        The network with its labels, if there is one.
    """

    batched: bool = True
    takes_languages: bool = False
    language: str | None = None
    languages: tuple[str, ...] = ()
    window_s: float | None = None
    normaliser: str | None = "plain"
    shows_encoder: bool = False
    counts_macs: bool = True
    thop_counts: bool = True
    model: Any = None

    @property
    def piece_s(self) -> float | None:
        """Longest audio that is transcribed in one piece, in seconds; None if there is no limit."""
        return self.window_s

    @property
    def technique(self) -> str:
        """Technique of `model`, for Results and tables; `none` without one."""
        return "none" if self.model is None else self.model.technique

    @property
    def label(self) -> str:
        """Variant of `model`, for Results and tables; `baseline` without one."""
        return "baseline" if self.model is None else self.model.label

    @property
    def changes(self) -> list[str]:
        """What is computed differently from the stored models, such as int8 weights: labels for the tables."""
        return []

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch.

        Arguments
        ---------
        wavs : torch.Tensor or numpy.ndarray
            [batch, time] or [time] at 16 kHz, on any device.
        wav_lens : torch.Tensor, optional
            Relative lengths from 0 to 1, [batch]; None if nothing is padded.
        languages : list of str or None, optional
            Language of each utterance, if `takes_languages`.
        """
        raise NotImplementedError

    def transcribe_files(
        self,
        sources: Iterable[Any],
        sample_rate: int | None = None,
        batch_size: int = 1,
        languages: list[str | None] | None = None,
    ) -> list[Transcript]:
        """Transcribe recordings of any length; channels are averaged.

        Arguments
        ---------
        sources : iterable
            Paths, binary file objects, arrays (with `sample_rate`), or pairs of an array and its sample rate. For the shape of
            arrays, see `efficient_asr.data.from_samples`.
        sample_rate : int, optional
            Sample rate of arrays without one, in Hz.
        batch_size : int
            Recordings transcribed together.
        languages : list of str or None, optional
            Language of each recording, if `takes_languages`.

        Returns
        -------
        list of Transcript
            One for each source, in order.

        Raises
        ------
        UserError
            If a source cannot be read, naming it.
        """
        sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
        found: list[Transcript] = []
        for start in range(0, len(sources), batch_size):
            wavs = [_read_source(source, sample_rate) for source in sources[start : start + batch_size]]
            more = {"languages": languages[start : start + batch_size]} if languages else {}
            found += self.transcribe(*pad_wavs(wavs), **more)
        return found

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

    def check_sequential(self) -> None:
        """Reject models and settings for which there is no `transcribe_sequentially`.

        Raises
        ------
        UserError
            Naming what to change.
        """
        raise UserError("long audio: only a plain Whisper model supports sequential decoding; use pauses or overlap")

    def with_times(self) -> Transcriber | None:
        """Return a transcriber of the same model whose transcripts have timed `segments`; None if the model predicts no times."""
        return None

    def for_long_audio(self) -> Transcriber:
        """Return a transcriber of the same model for the pieces of one recording; setting its language changes no other."""
        return copy.copy(self)

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


def _read_source(source: Any, sample_rate: int | None) -> torch.Tensor:
    """Return the audio [time] of a source of `transcribe_files`."""
    if isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
        return load_audio(source)
    if isinstance(source, tuple) and len(source) == 2:
        return from_samples(*source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        if sample_rate is None:
            raise UserError("sample_rate: give the sample rate of arrays, or pairs of an array and its sample rate")
        return from_samples(source, sample_rate)
    raise UserError(f"cannot transcribe a {type(source).__name__}; use a path, a binary file object or an array")


def transcribe_rows(
    transcriber: Transcriber, rows: list[Row], wavs: torch.Tensor, wav_lens: torch.Tensor
) -> list[Transcript]:
    """Transcribe utterances, [batch, time] with relative lengths [batch]; pass the rows' languages if `takes_languages`."""
    if transcriber.takes_languages:
        return transcriber.transcribe(wavs, wav_lens, languages=[row.get("language") for row in rows])
    return transcriber.transcribe(wavs, wav_lens)
