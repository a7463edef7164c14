"""DistillingBrain: a WhisperBrain that can have a teacher. Losses are in `techniques/distillation.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr import distributed
from efficient_asr.brains import WhisperBrain
from efficient_asr.data import BatchOrder, Rows
from efficient_asr.errors import UserError
from efficient_asr.evaluation.transcriber import fingerprint
from efficient_asr.models import resolve_source
from efficient_asr.models.whisper_asr import Whisper
from efficient_asr.techniques.distillation import Teacher, TeacherCache, TeacherDistribution


class DistillingBrain(WhisperBrain):
    """Trains a Whisper with cross-entropy and, where the YAML file names a `teacher`, with what that one thinks of each token.

    The teacher is asked at every step, or once for all with `teacher_cache`: what it said of the audio as it is then stands for
    augmented audio too.
    """

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load the student, and give it the loss, whose weights may be learned."""
        model = cls.adapt(super().build(hparams, rows), hparams, rows)
        if hparams["freeze_encoder"] and type(model) is not Whisper:
            raise UserError(
                "freeze_encoder: only new parts are trained here anyway; expert_layers: decoder puts them there alone"
            )
        if hparams["teacher"]:
            model.distillation = hparams["distillation"]
        trained = sum(parameter.numel() for parameter in model.network.parameters() if parameter.requires_grad)
        print(f"{trained / 1e6:.2f} M parameters are trained")
        model.history = {"training": {"trained_parameters": trained} | cls.about(model)}
        return model

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Put a technique into the student."""
        return model

    @staticmethod
    def about(model: Any) -> dict[str, Any]:
        """Return what is worth noting of the technique."""
        return {}

    @staticmethod
    def loader(model: Whisper, rows: Rows, hparams: dict[str, Any], order: BatchOrder, key: str) -> DataLoader:
        """Return the loader; before that of the training split, ask the teacher for what is not kept yet."""
        if key == "train_split" and hparams["teacher"] and hparams["teacher_cache"]:
            cache = open_cache(hparams)
            if distributed.if_main_process():
                device = "cuda" if torch.cuda.is_available() else "cpu"
                teacher = Teacher(resolve_source(hparams["teacher"]), model, hparams["teacher_dtype"])
                asked = cache.fill(teacher, model, rows, device)
                print(
                    f"{cache.folder}: the teacher was asked about {asked} utterances, the other {len(rows) - asked} were there"
                )
            distributed.ddp_barrier()
        return WhisperBrain.loader(model, rows, hparams, order, key)

    def on_fit_start(self) -> None:
        """Open what is kept of the teacher, or load it."""
        super().on_fit_start()
        self.teacher: Teacher | TeacherCache | None = None
        if self.hparams.teacher:
            settings = vars(self.hparams)
            if settings["teacher_cache"]:
                self.teacher = open_cache(settings)
            else:
                self.teacher = Teacher(resolve_source(self.hparams.teacher), self.model, self.hparams.teacher_dtype)

    def ask(self, batch: Any) -> TeacherDistribution:
        """Return what the teacher thinks of a batch."""
        tokens = batch.tokens[0]
        if isinstance(self.teacher, TeacherCache):
            return self.teacher.read(batch.id, tokens, self.token_lengths(batch))
        return self.teacher(*self.heard, tokens[:, :-1], self.model.distillation.temperature)

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
            weigh = self.model.distillation
            loss = weigh(loss, weigh.divergence(self.ask(batch), predictions, self.predicted(batch)), self.progress)
        return loss


def open_cache(hparams: dict[str, Any]) -> TeacherCache:
    """Open what is kept of a teacher, as the YAML file has it."""
    source = resolve_source(hparams["teacher"])
    about = {
        "teacher": fingerprint(source), "dtype": hparams["teacher_dtype"],
        "temperature": float(hparams["temperature"]), "entries": hparams["teacher_entries"],
    }  # fmt: skip
    return TeacherCache(Path(hparams["teacher_cache"]), about)
