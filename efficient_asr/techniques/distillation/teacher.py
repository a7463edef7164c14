"""The teacher of a distillation, and an on-disk cache of its distributions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from efficient_asr.data import FeatureStore, Row, Rows, absolute_lengths
from efficient_asr.models.whisper.decoding import Encoded
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.losses import TeacherDistribution, with_rest
from efficient_asr.utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen Whisper that provides target distributions.

    Arguments
    ---------
    source : str
        Directory or hub id.
    student : Whisper
        The student; both must have the same vocabulary.
    dtype : str
        Precision of the teacher: `float32`, or `bfloat16` and `float16` on GPUs.

    Raises
    ------
    UserError
        If it cannot be loaded, or its vocabulary or window length differs from the student's.
    """

    def __init__(self, source: str, student: Whisper, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise UserError(f"teacher_dtype: expected one of {', '.join(DTYPES)}, got '{dtype}'")
        self.model = Whisper.from_source(source).requires_grad_(False).eval()
        sizes = [len(model.tokenizer) for model in (self.model, student)]
        if self.model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"teacher: the vocabulary of '{source}' ({sizes[0]} entries) differs from the student's ({sizes[1]}); use "
                "a teacher with the same vocabulary (large-v3 only matches students with the large-v3 vocabulary)"
            )
        if self.model.window_samples != student.window_samples:
            raise UserError(f"teacher: '{source}' and the student have different window lengths; use another teacher")
        self.model.network.to(DTYPES[dtype])

    @torch.no_grad()
    def __call__(
        self,
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        encoded: Encoded | None = None,
    ) -> TeacherDistribution:
        """Return the next-token distributions for `tokens` [batch, tokens], given wavs [batch, time] and lengths [batch].

        With `encoded`, states of the teacher's encoder, the encoder is not run.
        """
        model = self.model.to(tokens.device)
        logits = model(wavs, lengths, tokens) if encoded is None else model.predict(encoded, tokens)
        return TeacherDistribution(log_softmax(logits.float() / temperature, dim=-1))


class TeacherCache:
    """A teacher's distributions on disk, one file per utterance; an interrupted `fill` resumes where it stopped.

    A file is valid for one utterance id, its tokens, and the size and modification time of the audio file. If the audio is
    replaced, the teacher is run again.

    Arguments
    ---------
    folder : Path
        Folder of the cache.
    about : dict
        Settings that the distributions depend on: teacher, dtype, temperature, entries per token.

    Raises
    ------
    UserError
        If the folder holds distributions for other settings.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.store, self.about = FeatureStore(folder, about, "teacher_cache"), about

    @property
    def folder(self) -> Path:
        """Folder of the cache."""
        return self.store.folder

    @staticmethod
    def _name(utterance: str, tokens: list[int]) -> str:
        return f"{utterance}\0{tokens}"

    def fill(
        self,
        teacher: Teacher,
        student: Whisper,
        rows: Rows,
        device: str = "cpu",
        encoded_of: Callable[[Row], Encoded] | None = None,
    ) -> int:
        """Compute the missing distributions, utterance by utterance; return how many were missing.

        With `encoded_of`, which returns the states of the teacher's encoder for a row, the encoder is not run.
        """
        wanted = self.missing(student, rows)

        def of_row(row: Row, wavs: torch.Tensor, wav_lens: torch.Tensor) -> dict[str, torch.Tensor]:
            lengths = absolute_lengths(wavs, wav_lens).to(device)
            encoded = encoded_of(row) if encoded_of is not None else None
            return self._compute(teacher, student.labels.encode_row(row), wavs.to(device), lengths, encoded)

        self.store.fill(wanted, self._namer(student), of_row, "running teacher")
        return len(wanted)

    def missing(self, student: Whisper, rows: Rows) -> Rows:
        """Return the utterances without a valid file: missing, outdated or damaged."""
        return self.store.missing(rows, self._namer(student))

    def _namer(self, student: Whisper) -> Callable[[Row], str]:
        return lambda row: self._name(row["id"], student.labels.encode_row(row))

    def _compute(
        self,
        teacher: Teacher,
        tokens: list[int],
        wavs: torch.Tensor,
        lengths: torch.Tensor,
        encoded: Encoded | None,
    ) -> dict[str, torch.Tensor]:
        asked = torch.tensor([tokens[:-1]], device=wavs.device)
        log_probs = teacher(wavs, lengths, asked, self.about["temperature"], encoded).log_probs[0]
        indices = log_probs.topk(min(self.about["entries"], log_probs.shape[-1]), dim=-1).indices
        return {"log_probs": with_rest(log_probs, indices).half(), "indices": indices.int()}

    def read(self, names: list[str], tokens: torch.Tensor, lengths: torch.Tensor) -> TeacherDistribution:
        """Return the distributions for a batch of ids [batch], tokens with end token [batch, tokens] and lengths [batch].

        Raises
        ------
        UserError
            If a distribution is missing or damaged.
        """
        parts = []
        for name, row, length in zip(names, tokens.tolist(), lengths.tolist(), strict=True):
            try:
                parts.append(self.store.read(self._name(name, row[:length])))
            except UserError as error:
                raise UserError(f"utterance '{name}': {error}") from None
        pad = nn.utils.rnn.pad_sequence
        log_probs = pad([part["log_probs"].float() for part in parts], batch_first=True)
        indices = pad([part["indices"].long() for part in parts], batch_first=True)
        return TeacherDistribution(log_probs.to(tokens.device), indices.to(tokens.device))
