"""Training loops: what SpeechBrain's Brain does not know about our models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jiwer
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import update_learning_rate
from torch import nn

from efficient_asr.data import Row, report_skipped
from efficient_asr.errors import UserError, listing
from efficient_asr.models import resolve_source
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.text import CharacterLabels


class CTCBrain(sb.Brain):
    """Fine-tunes an encoder with a CTC head.

    The encoder and the rest (head, front end) have an optimiser each, annealed by NewBob on the validation loss; the
    checkpoint with the lowest greedy validation WER is kept.
    """

    @classmethod
    def build(cls, hparams: dict[str, Any], texts: list[str]) -> CTCModel:
        """Put the model of a YAML file together; its alphabet comes from the training texts.

        Where `pretrained_model` names a model folder, alphabet and weights come from there.
        """
        folder = hparams["pretrained_model"]
        if folder:
            labels = CTCModel.load(resolve_source(folder)).labels
        else:
            labels = CharacterLabels.from_texts(texts)
        unknown = set().union(*(labels.unknown(text) for text in texts))
        if unknown:
            raise UserError(
                f"the training text has characters that {folder} does not know: {' '.join(sorted(unknown))}"
            )
        encoder = hparams["encoder"]
        head = hparams["head"](encoder.hidden_size, len(labels))
        model = CTCModel(hparams["frontend"], encoder, head, labels)
        if folder:
            new = model.start_from(resolve_source(folder))
            print(f"started from {folder}" + (f"; new: {', '.join(new)}" if new else ""))
        return model

    @staticmethod
    def check_lengths(
        model: CTCModel, rows: list[Row], fastest: float, skip_bad: bool, skipped_file: Path
    ) -> list[Row]:
        """Find the utterances whose audio gives fewer CTC frames than their transcript needs.

        CTC needs a frame for each character and one more between equal neighbours.

        Arguments
        ---------
        model : CTCModel
            Knows how many frames come out.
        rows : list of dict
            Training utterances.
        fastest : float
            The highest speed that augmentation may apply.
        skip_bad : bool
            Leave such utterances out instead of stopping.
        skipped_file : Path
            Where those left out are listed.

        Raises
        ------
        UserError
            Naming the utterances.
        """
        samples = torch.tensor([int(row["duration"] * 16000 / fastest) for row in rows])
        frames = model.frame_lengths(samples).tolist()
        bad, good = [], []
        for row, available in zip(rows, frames, strict=True):
            tokens = model.labels.encode(row["text"])
            needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if available < needed:
                problem = f"{row['duration']:.2f} s give {available} frames, its {len(tokens)} characters need {needed}"
                bad.append({"id": row["id"], "problem": problem})
            else:
                good.append(row)
        if bad and not skip_bad:
            shown = listing([f"{b['id']}: {b['problem']}" for b in bad])
            raise UserError(
                f"{len(bad)} of {len(rows)} training utterances become too short for their transcripts:\n{shown}\n"
                "Take a smaller downsampling_factor, let the head emit more (--frames_per_state 2), or leave them out "
                "with --skip_bad True."
            )
        if bad:
            report_skipped("too short after downsampling", bad, skipped_file)
        if not good:
            raise UserError("no training utterance is long enough for its transcript")
        return good

    @property
    def model(self) -> CTCModel:
        """The model itself, also under DistributedDataParallel."""
        return getattr(self.modules["model"], "module", self.modules["model"])

    def init_optimizers(self) -> None:
        """One optimiser for the encoder (if anything in it is trained), one for everything else."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["encoder" if name.startswith("encoder.") else "head"].append(parameter)
        make = {"encoder": self.hparams.encoder_optimizer, "head": self.hparams.head_optimizer}
        self.optimizers_dict = {}
        for name, parameters in groups.items():
            if parameters:
                self.optimizers_dict[name] = make[name](parameters)
                self.checkpointer.add_recoverable(f"{name}_optimizer", self.optimizers_dict[name])

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [batch, frames, labels] and frame lengths [batch]."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.augment(wavs, wav_lens)
        return self.modules["model"](wavs, wav_lens)

    def compute_objectives(self, predictions: tuple, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the CTC loss, and count errors outside training."""
        log_probs, frame_lengths = predictions
        tokens, token_lens = batch.tokens
        targets = (token_lens * tokens.shape[1]).round().long()
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1), tokens, frame_lengths, targets, CharacterLabels.blank_index, zero_infinity=True
        )
        if stage != sb.Stage.TRAIN:
            self.references += batch.text
            self.hypotheses += greedy_texts(log_probs, frame_lengths, self.model.labels)
        return loss

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start counting errors."""
        self.references: list[str] = []
        self.hypotheses: list[str] = []

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Log, anneal, keep the best checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = float(stage_loss)
            return
        wer_percent = 100 * jiwer.wer(self.references, self.hypotheses)
        schedulers = {"encoder": self.hparams.encoder_scheduler, "head": self.hparams.head_scheduler}
        rates = {}
        for name, optimizer in self.optimizers_dict.items():
            old, new = schedulers[name](stage_loss)
            update_learning_rate(optimizer, new)
            rates[f"lr_{name}"] = old
        stats = {"loss": float(stage_loss), "wer_percent": wer_percent}
        for logger in self.hparams.train_loggers:  # on every process: SpeechBrain's loggers see to it that one writes
            logger.log_stats(
                stats_meta={"epoch": epoch, **rates}, train_stats={"loss": self.train_loss}, valid_stats=stats
            )
        self.checkpointer.save_and_keep_only(meta={"WER": wer_percent, "epoch": epoch}, min_keys=["WER"])

    @staticmethod
    def technique_of(model: CTCModel, technique: str) -> str:
        """Name of the technique for the Result; `none` where its setting is the identity."""
        identity = isinstance(model.frontend, nn.Identity) or model.frontend.is_identity
        return "none" if identity else technique

    @staticmethod
    def details_of(model: CTCModel) -> dict[str, Any]:
        """Technique-specific entries of the Result."""
        return {}
