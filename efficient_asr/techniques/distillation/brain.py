"""DistillingBrain: a WhisperBrain that can have a teacher. Losses are in `losses.py`, the teacher is in `teacher.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr.data import Rows
from efficient_asr.models.sources import fingerprint, resolve_source
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.losses import TeacherDistribution
from efficient_asr.techniques.distillation.teacher import Teacher, TeacherCache
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError

LOSS = "distillation"  # among the model's training modules


class DistillingBrain(WhisperBrain):
    """Trains a Whisper with cross-entropy and, where the YAML file names a `teacher`, with what that one thinks of each token.

    The teacher is asked at every step, or once for all with `teacher_cache`: what it said of the audio as it is then stands for
    augmented audio too.
    """

    @staticmethod
    def baseline_source(hparams: dict[str, Any]) -> str | None:
        """Return None: a student as it is would stand under the name of the technique."""
        return None

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load the student, and give it the loss, whose weights may be learned."""
        model = super().build(hparams, rows)
        if hparams["freeze_encoder"] and type(model) is not Whisper:
            raise UserError("freeze_encoder: only new parts are trained here, wherever they are; leave it at False")
        if hparams["teacher"]:
            model.training_modules[LOSS] = hparams["distillation"]
        print(f"{model.history['training']['trained_parameters'] / 1e6:.2f} M parameters are trained")
        return model

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Load the teacher, or ask it for what is not kept yet; then train."""
        self.teacher = self._open_teacher(train_loader.dataset.rows) if self.hparams.teacher else None
        super().train(train_loader, valid_loader)

    def _open_teacher(self, rows: Rows) -> Teacher | TeacherCache:
        source, dtype = resolve_source(self.hparams.teacher), self.hparams.teacher_dtype
        if not self.hparams.teacher_cache:
            return Teacher(source, self.model, dtype)
        about = {
            "teacher": fingerprint(source), "dtype": dtype, "temperature": float(self.hparams.temperature),
            "entries": self.hparams.teacher_entries,
        }  # fmt: skip
        cache = TeacherCache(Path(self.hparams.teacher_cache), about)
        share = range(distributed.rank(), len(rows), distributed.world_size())
        mine, asked = cache.missing(self.model, rows.select(share)), 0
        if len(mine) or distributed.if_main_process():  # which sees whether the teacher fits, though all may be there
            asked = cache.fill(Teacher(source, self.model, dtype), self.model, mine, str(self.device))
        (total,) = map(round, distributed.all_reduce([float(asked)]))  # acts as a barrier
        print(
            f"{cache.folder}: the teacher was asked about {total} utterances, the other {len(rows) - total} were there"
        )
        return cache

    def ask(self, batch: Any) -> TeacherDistribution:
        """Return what the teacher thinks of a batch."""
        tokens = batch.tokens[0]
        if isinstance(self.teacher, TeacherCache):
            return self.teacher.read(batch.id, tokens, self.token_lengths(batch))
        return self.teacher(*self.heard, tokens[:, :-1], self.model.training_modules[LOSS].temperature)

    def technique_loss(self) -> torch.Tensor | float:
        """Return what a technique adds to the cross-entropy of a training step."""
        return 0.0

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss: cross-entropy alone outside training."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage != sb.Stage.TRAIN:
            return loss
        loss = loss + self.technique_loss()
        if self.teacher is not None:
            weigh = self.model.training_modules[LOSS]
            loss = weigh(loss, weigh.divergence(self.ask(batch), predictions, self.predicted(batch)), self.progress)
        return loss
