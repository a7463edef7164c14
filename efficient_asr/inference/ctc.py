"""Transcriber for CTC models: greedy decoding, or beam search with a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from efficient_asr.data import Row, absolute_lengths, check_wavs
from efficient_asr.inference.language_model import LanguageModel
from efficient_asr.inference.transcriber import Transcriber
from efficient_asr.inference.transcript import Transcript
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.utils.errors import UserError

CACHED = 1 << 19  # numbers in a batch of encoder states that stay in a CPU's cache, about
SAMPLES_PER_FRAME = 320


class CTCTranscriber(Transcriber):
    """Transcriber for a CTC model, with greedy decoding or a language model.

    Arguments
    ---------
    model : CTCModel
        The model, or one exported to ONNX (`efficient_asr.models.interchange.onnx.OnnxCTC`); it is set to evaluation mode.
    language_model : LanguageModel, optional
        Language model for beam search; None decodes greedily.
    """

    def __init__(self, model: CTCModel, language_model: LanguageModel | None = None) -> None:
        self.model, self.language_model = model.eval(), language_model
        self.device = "cpu"

    def check_rows(self, rows: Iterable[Row], split: str) -> None:
        """Reject utterances that are longer than the encoder's window, before the first one is transcribed.

        Raises
        ------
        UserError
            Naming the first such utterance.
        """
        if not isinstance(self.model, CTCModel) or math.isinf(self.model.encoder.longest_s):
            return
        rows = list(rows)
        for i in self.model.too_long([row["duration"] for row in rows])[:1]:
            raise UserError(
                f"utterance '{rows[i]['id']}' of '{split}' has {rows[i]['duration']:.2f} s, more than the "
                f"{self.model.encoder.longest_s:g} s of this encoder; split it, or leave it out"
            )

    def transcribe(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None, languages: list[str | None] | None = None
    ) -> list[Transcript]:
        """Transcribe a batch, [batch, time] at 16 kHz with relative lengths [batch]."""
        wavs, wav_lens = check_wavs(wavs, wav_lens)
        lengths, found = absolute_lengths(wavs, wav_lens.nan_to_num().to(wavs.device)), []
        for start, end in self._pieces(lengths):
            longest = max(1, int(lengths[start:end].max()))
            found += self._transcribe(wavs[start:end, :longest], lengths[start:end] / longest)
        return found

    def _transcribe(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> list[Transcript]:
        with torch.no_grad():
            output = self.model.recognise(wavs.to(self.device), wav_lens.to(self.device))
        log_probs, frame_lengths = output.log_probs, output.frame_lengths
        if self.language_model is not None:
            texts = self.language_model.decode(log_probs, frame_lengths)
        else:
            texts = greedy_texts(log_probs, frame_lengths, self.model.labels)
        details = output.details or [{} for _ in texts]
        return [Transcript(text, entry) for text, entry in zip(texts, details, strict=True)]

    def _pieces(self, lengths: torch.Tensor) -> list[tuple[int, int]]:
        """Return first and end of the parts in which a batch with `lengths` samples [batch] is transcribed.

        One utterance keeps a CPU busy. Larger batches only help small models; with others, the states of all utterances no longer
        fit into the cache, and all that is not a matrix product takes longer (activations, sums: twice as long, measured with
        Whisper base's encoder at batch 8). On other devices, there is one part.
        """
        if self.device != "cpu" or not self.counts_macs:
            return [(0, len(lengths))]
        most = CACHED / self.model.encoder.hidden_size * SAMPLES_PER_FRAME
        pieces, start = [], 0
        for i in range(1, len(lengths) + 1):
            full = i < len(lengths) and int(lengths[start : i + 1].max()) * (i + 1 - start) > most
            if i == len(lengths) or full:
                pieces.append((start, i))
                start = i
        return pieces

    def to(self, device: str) -> CTCTranscriber:
        """Move to a device and return self.

        Raises
        ------
        UserError
            If it is not the CPU, and the model has been exported to ONNX.
        """
        if not self.counts_macs and not str(device).startswith("cpu"):
            raise UserError("device: an exported CTC model runs on the CPU; use --device cpu, or the original model")
        self.model.to(device)
        self.device = device
        return self

    @property
    def counts_macs(self) -> bool:
        """Whether PyTorch runs the model; not if it has been exported to ONNX."""
        return isinstance(self.model, CTCModel)

    def parameters_count(self) -> int | None:
        """Return the number of weights of the model; None for an exported one."""
        return super().parameters_count() if self.counts_macs else None

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration of the model's parts."""
        return self.model.settings

    def summary(self, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return what the techniques did over a whole benchmark."""
        return self.model.summary(records)
