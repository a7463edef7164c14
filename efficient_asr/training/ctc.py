"""CTCBrain: fine-tunes an encoder with a CTC head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from torch import nn

from efficient_asr.data import SAMPLE_RATE, Rows
from efficient_asr.models.ctc import CTCModel, greedy_texts
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.models.sources import resolve_source
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.training.brain import RecipeBrain, leave_out


class CTCBrain(RecipeBrain):
    """Fine-tunes an encoder with a CTC head.

    The encoder and the rest (head, front end) have an optimiser each, annealed by NewBob on the validation loss; the
    checkpoint with the lowest greedy validation WER is kept.
    """

    takes_language_model = True

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> CTCModel:
        """Put the model of a YAML file together; its alphabet comes from the training texts.

        Where `pretrained_model` names a model folder, alphabet and weights come from there.
        """
        folder = hparams["pretrained_model"]
        labels = (
            CTCModel.load(resolve_source(folder)).labels
            if folder
            else CharacterLabels.from_texts(row["text"] for row in rows)
        )
        encoder = hparams["encoder"]
        model = CTCModel(hparams["frontend"], encoder, cls.make_head(hparams, encoder, len(labels)), labels)
        if folder:
            new = model.start_from(resolve_source(folder))
            print(f"started from {folder}" + (f"; new: {', '.join(new)}" if new else ""))
        return model

    @staticmethod
    def make_head(hparams: dict[str, Any], encoder: Encoder, n_labels: int) -> nn.Module:
        """Make the head that the YAML describes."""
        return hparams["head"](encoder.hidden_size, n_labels)

    @staticmethod
    def check_rows(model: CTCModel, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Find the utterances that this model cannot learn from.

        Their text has characters outside the alphabet, or their audio gives fewer CTC frames than their text needs: one for
        each character and one more between equal neighbours.

        Arguments
        ---------
        model : CTCModel
            Knows its alphabet and how many frames come out.
        rows : Rows
            Training utterances.
        hparams : dict
            Whether such utterances may be left out (`skip_bad`), and the highest speed that augmentation may apply.
        skipped_file : Path
            Where those left out are listed.

        Raises
        ------
        UserError
            Naming the utterances.
        """
        skip_bad, fastest = hparams["skip_bad"], hparams["augment"].fastest
        frames = model.frame_lengths(
            torch.from_numpy((rows.durations * SAMPLE_RATE / fastest).astype(np.int64))
        ).tolist()
        bad = {}
        for i, (row, available) in enumerate(zip(rows, frames, strict=True)):
            unknown = model.labels.unknown(row["text"])
            tokens = model.labels.encode(row["text"])
            needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if unknown:
                bad[i] = f"its text has characters that the model does not know: {' '.join(sorted(unknown))}"
            elif available < needed:
                bad[i] = f"{row['duration']:.2f} s give {available} frames, its {len(tokens)} characters need {needed}"
        advice = (
            f"Leave them out with --skip_bad True. Where frames are too few, {model.few_frames_advice}a head that emits more "
            "(--frames_per_state 2) helps; where characters are unknown, another train_normaliser."
        )
        return leave_out(rows, bad, skip_bad, skipped_file, advice)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The encoder (if anything in it is trained), and everything else."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["encoder" if name.startswith("encoder.") else "head"].append(parameter)
        return groups

    def compute_forward(self, batch: Any, stage: sb.Stage, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [batch, frames, labels] and frame lengths [batch]; options are the model's."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.augment(wavs, wav_lens)
        # Validation goes round DistributedDataParallel, whose processes would wait for each other at every batch.
        return (self.modules["model"] if stage == sb.Stage.TRAIN else self.model)(wavs, wav_lens, **options)

    def compute_objectives(self, predictions: tuple, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the CTC loss, and count errors outside training."""
        log_probs, frame_lengths = predictions
        if stage != sb.Stage.TRAIN:
            self.count(batch.text, greedy_texts(log_probs, frame_lengths, self.model.labels))
        return ctc_loss(log_probs, frame_lengths, batch)


def ctc_loss(log_probs: torch.Tensor, frame_lengths: torch.Tensor, batch: Any) -> torch.Tensor:
    """Mean CTC loss of [batch, frames, labels] with lengths [batch] for the batch's `tokens`."""
    tokens, token_lens = batch.tokens
    targets = (token_lens * tokens.shape[1]).round().long()
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), tokens, frame_lengths, targets, CharacterLabels.blank_index, zero_infinity=True
    )
