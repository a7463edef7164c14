"""DistillingBrain: a WhisperBrain with an optional teacher. See `losses.py` for losses, `teacher.py` for the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr.data import Row, Rows
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint
from efficient_asr.models.whisper.decoding import Encoded
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distillation.losses import TeacherDistribution
from efficient_asr.techniques.distillation.teacher import Teacher, TeacherCache
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError

LOSS = "distillation"  # key in the model's training modules


class DistillingBrain(WhisperBrain):
    """Train a Whisper with cross-entropy and, if the YAML file sets `teacher`, with distillation from that model.

    The teacher is run at every step, or only once per utterance with `teacher_cache`. Cached distributions are computed on
    the original audio and are also used when the student's input is augmented.
    """

    filled_before_training = ("teacher_cache",)

    @staticmethod
    def baseline_source(hparams: dict[str, Any]) -> str | None:
        """Return None: an untrained student must not be listed as a baseline under the name of the technique."""
        return None

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load the student and attach the distillation loss, whose weights may be learned."""
        model = super().build(hparams, rows)
        if hparams["freeze_encoder"] and type(model) is not Whisper:
            raise UserError(
                "freeze_encoder: only the new modules are trained here, even in the encoder; set it to False"
            )
        if hparams["teacher"]:
            model.training_modules[LOSS] = hparams["distillation"]
        print(f"{model.history['training']['trained_parameters'] / 1e6:.2f} M trainable parameters")
        return model

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Load the teacher, or compute the distributions missing from its cache; then train."""
        self.teacher = self._open_teacher(train_loader.dataset.rows) if self.hparams.teacher else None
        super().train(train_loader, valid_loader)

    def _open_teacher(self, rows: Rows) -> Teacher | TeacherCache:
        source, dtype = model_source(self.hparams.teacher), self.hparams.teacher_dtype
        if not self.hparams.teacher_cache:
            return Teacher(source, self.model, dtype)
        about = {
            "teacher": fingerprint(source), "dtype": dtype, "temperature": float(self.hparams.temperature),
            "entries": self.hparams.teacher_entries,
        }  # fmt: skip
        cache = TeacherCache(Path(self.hparams.teacher_cache), about)
        share = distributed.share(len(rows))
        mine, asked = cache.missing(self.model, rows.select(share)), 0
        if len(mine) or distributed.if_main_process():  # it checks the teacher even if nothing is missing
            teacher = Teacher(source, self.model, dtype)
            asked = cache.fill(teacher, self.model, mine, str(self.device), self.states_for(teacher))
        (total,) = map(round, distributed.all_reduce([float(asked)]))  # acts as a barrier
        print(f"{cache.folder}: ran the teacher on {total} utterances, {len(rows) - total} others were already cached")
        return cache

    def states_for(self, teacher: Teacher) -> Callable[[Row], Encoded] | None:
        """Return what gives the states of the teacher's encoder for a row, if they are known; None to run the encoder."""
        return None

    def ask(self, batch: Any) -> TeacherDistribution:
        """Return the teacher's distribution for a batch, from the cache or from the model."""
        tokens = batch.tokens[0]
        if isinstance(self.teacher, TeacherCache):
            return self.teacher.read(batch.id, tokens, self.token_lengths(batch))
        return self.teacher(*self.heard, tokens[:, :-1], self.model.training_modules[LOSS].temperature)

    def technique_loss(self) -> torch.Tensor | float:
        """Return the term that a technique adds to the cross-entropy of a training step."""
        return 0.0

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss; outside training, only the cross-entropy."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage != sb.Stage.TRAIN:
            return loss
        loss = loss + self.technique_loss()
        if self.teacher is not None:
            weigh = self.model.training_modules[LOSS]
            loss = weigh(loss, weigh.divergence(self.ask(batch), predictions, self.predicted(batch)), self.progress)
        return loss
