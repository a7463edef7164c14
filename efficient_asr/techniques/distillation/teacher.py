"""efficient_asr.techniques.distillation.losses.teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from efficient_asr.data import FeatureStore, Row, Rows, absolute_lengths, iterate_batches
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.losses import TeacherDistribution, with_rest
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import file_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A Whisper that is asked, and learns nothing.

    Arguments
    ---------
    source : str
        Directory or hub id.
    student : Whisper
        Who is taught: both must have the same vocabulary.
    dtype : str
        What the teacher computes in: `float32`, or `bfloat16` and `float16` on GPUs.

    Raises
    ------
    UserError
        Where it cannot be loaded, or speaks another vocabulary.
    """

    def __init__(self, source: str, student: Whisper, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise UserError(f"teacher_dtype: '{dtype}' is not {', '.join(DTYPES)}")
        self.model = Whisper.from_source(source).requires_grad_(False).eval()
        sizes = [len(model.tokenizer) for model in (self.model, student)]
        if self.model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"teacher: '{source}' has another vocabulary than the student ({sizes[0]} and {sizes[1]} entries); "
                "token by token they cannot be compared (large-v3 goes with students of its own vocabulary only)"
            )
        if self.model.window_samples != student.window_samples:
            raise UserError(f"teacher: '{source}' has a window of another length than the student")
        self.model.network.to(DTYPES[dtype])

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, temperature: float
    ) -> TeacherDistribution:
        """Return what follows each of `tokens` [batch, tokens], given [batch, time] with lengths [batch]."""
        logits = self.model.to(wavs.device)(wavs, lengths, tokens)
        return TeacherDistribution(log_softmax(logits.float() / temperature, dim=-1))


class TeacherCache:
    """A teacher's distributions on the disk, one file an utterance; an interrupted pass continues where it was.

    A file belongs to id, tokens, and size and time of the audio file: of audio that was exchanged the teacher is asked again.

    Arguments
    ---------
    folder : Path
        Where.
    about : dict
        What they depend on: teacher, temperature, entries a token.

    Raises
    ------
    UserError
        Where the folder holds those of other settings.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.store, self.about = FeatureStore(folder, about, "teacher_cache"), about

    @property
    def folder(self) -> Path:
        """Where the distributions are."""
        return self.store.folder

    @staticmethod
    def _name(utterance: str, tokens: list[int]) -> str:
        return f"{utterance}\0{tokens}"

    def fill(self, teacher: Teacher, student: Whisper, rows: Rows, device: str = "cpu") -> int:
        """Compute what is missing, utterance by utterance; returns how many were."""
        wanted = self.missing(student, rows)
        for (row,), wavs, wav_lens in tqdm(
            iterate_batches(wanted, 1), total=len(wanted), desc="asking the teacher", unit="utt", leave=False, mininterval=1,
            disable=not len(wanted) or not distributed.if_main_process(),
        ):  # fmt: skip
            self._keep(teacher, student, row, wavs.to(device), absolute_lengths(wavs, wav_lens).to(device))
        return len(wanted)

    def missing(self, student: Whisper, rows: Rows) -> Rows:
        """Return the utterances that the teacher has not been asked about, or of which the file is damaged."""

        def is_kept(row: Row) -> bool:
            name = self._name(row["id"], student.labels.encode_row(row))
            return self.store.holds(name, {"audio": file_state(row["audio"])})

        return rows.select([i for i, row in enumerate(rows) if not is_kept(row)])

    def _keep(self, teacher: Teacher, student: Whisper, row: Row, wavs: torch.Tensor, lengths: torch.Tensor) -> None:
        tokens = student.labels.encode_row(row)
        asked = torch.tensor([tokens[:-1]], device=wavs.device)
        log_probs = teacher(wavs, lengths, asked, self.about["temperature"]).log_probs[0]
        indices = log_probs.topk(min(self.about["entries"], log_probs.shape[-1]), dim=-1).indices
        features = {"log_probs": with_rest(log_probs, indices).half(), "indices": indices.int()}
        self.store.write(self._name(row["id"], tokens), features, {"audio": file_state(row["audio"])})

    def read(self, names: list[str], tokens: torch.Tensor, lengths: torch.Tensor) -> TeacherDistribution:
        """Return the distributions of a batch: ids [batch], tokens with their end [batch, tokens] and lengths [batch].

        Raises
        ------
        UserError
            Where one is missing or damaged.
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
