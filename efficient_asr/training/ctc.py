"""CTCBrain: fine-tunes an encoder with a CTC head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch import nn
from torch.utils.data import DataLoader

from efficient_asr.data import Rows
from efficient_asr.evaluation.benchmark import Benchmark
from efficient_asr.models.ctc import CTCModel, greedy_texts, samples_of
from efficient_asr.models.encoders.base import Encoder
from efficient_asr.models.hub import model_source
from efficient_asr.models.interchange.speechbrain import (
    is_speechbrain_checkpoint,
    read_labels,
    start_from_speechbrain,
)
from efficient_asr.text.labels import CharacterLabels
from efficient_asr.training.brain import RecipeBrain, leave_out
from efficient_asr.training.frozen_layers import FrozenLayers, check_frozen_layers
from efficient_asr.utils.errors import UserError

_SHORTER = "Pass --skip_bad True to leave them out, or reduce max_duration_s."


class CTCBrain(RecipeBrain):
    """Fine-tunes an encoder with a CTC head.

    The encoder and the remaining modules (head, front end) have separate optimisers, annealed by NewBob on the validation
    loss. The checkpoint with the lowest greedy validation WER is kept.
    """

    takes_language_model = True
    filled_before_training = ("layer_states_folder",)

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> CTCModel:
        """Build the model described by a YAML file, with an alphabet derived from the training texts.

        If `pretrained_model` names a model folder, or a CTC checkpoint of SpeechBrain, the alphabet and the weights are loaded
        from it.
        """
        folder = hparams["pretrained_model"] and model_source(hparams["pretrained_model"])
        by_speechbrain = bool(folder) and is_speechbrain_checkpoint(folder)
        if by_speechbrain:
            labels, _ = read_labels(folder)
        elif folder:
            labels = CTCModel.load(folder).labels
        else:
            labels = CharacterLabels.from_texts(row["text"] for row in rows)
        encoder = hparams["encoder"]
        model = CTCModel(hparams["frontend"], encoder, cls.make_head(hparams, encoder, len(labels)), labels)
        if folder:
            new = start_from_speechbrain(model, folder) if by_speechbrain else model.start_from(folder)
            print(f"started from {folder}" + (f"; new: {', '.join(new)}" if new else ""))
        check_frozen_layers(model, hparams)
        return model

    @staticmethod
    def make_head(hparams: dict[str, Any], encoder: Encoder, n_labels: int) -> nn.Module:
        """Build the head described by the YAML file."""
        return hparams["head"](encoder.hidden_size, n_labels)

    @staticmethod
    def check_rows(model: CTCModel, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Find the utterances that this model cannot be trained on.

        The text has characters outside the alphabet, the audio is longer than the encoder's window, or it yields fewer CTC frames
        than the text needs: one per character, plus one between each pair of identical adjacent characters.

        Arguments
        ---------
        model : CTCModel
            Provides the alphabet and the number of output frames.
        rows : Rows
            Training utterances.
        hparams : dict
            Provides `skip_bad` (whether to skip such utterances) and the highest speed that augmentation may apply.
        skipped_file : Path
            File that lists the skipped utterances.

        Raises
        ------
        UserError
            Naming the utterances.
        """
        skip_bad, fastest, slowest = hparams["skip_bad"], hparams["augment"].fastest, hparams["augment"].slowest
        longest_s = model.encoder.longest_s
        frames, too_long = (
            model.frame_lengths(samples_of(rows.durations, fastest)).tolist(),
            {*model.too_long(rows.durations, slowest)},
        )
        bad = {}
        for i, (row, available) in enumerate(zip(rows, frames, strict=True)):
            unknown = model.labels.unknown(row["text"])
            tokens = model.labels.encode(row["text"])
            needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if i in too_long:
                at_speed = f" at {100 * slowest:g} % speed" if slowest < 1 else ""
                bad[i] = f"{row['duration']:.2f} s{at_speed} are more than the {longest_s:g} s of this encoder"
            elif unknown:
                bad[i] = f"its text has characters that the model does not know: {' '.join(sorted(unknown))}"
            elif available < needed:
                bad[i] = (
                    f"{row['duration']:.2f} s yield {available} frames, but its {len(tokens)} characters need {needed}"
                )
        advice = (
            f"Pass --skip_bad True to leave them out. If there are too few frames, use {model.few_frames_advice}a head with "
            "more of them (--frames_per_state 2); if characters are unknown, use another train_normaliser; if audio is too long, "
            "reduce max_duration_s, or use no slow speeds_percent."
        )
        return leave_out(rows, bad, skip_bad, skipped_file, advice)

    @staticmethod
    def check_valid_rows(model: CTCModel, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Find the utterances that are longer than the encoder's window."""
        bad = {
            i: f"{rows[i]['duration']:.2f} s are more than the {model.encoder.longest_s:g} s of this encoder"
            for i in model.too_long(rows.durations)
        }
        return leave_out(rows, bad, skip_bad=hparams["skip_bad"], skipped_file=skipped_file, advice=_SHORTER)

    @staticmethod
    def check_benchmark(model: CTCModel, benchmark: Benchmark, hparams: dict[str, Any]) -> None:
        """Reject utterances that are longer than the encoder's window, which is not split."""
        for i in model.too_long(benchmark.rows.durations)[:1]:
            row = benchmark.rows[i]
            raise UserError(
                f"{benchmark.split}: '{row['id']}' has {row['duration']:.2f} s, more than the "
                f"{model.encoder.longest_s:g} s of this encoder; split it, or test on another split"
            )

    @classmethod
    def made_of(cls, hparams: dict[str, Any], rows: dict[str, Rows]) -> dict[str, str]:
        """Return whether states of frozen layers come from the disk, where they are in half precision."""
        return {"stored states": str(bool(hparams["layer_states_folder"]))} if hparams["freeze_layers"] else {}

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Compute the states of the frozen layers that are missing, then train."""
        self.frozen = None
        if self.hparams.freeze_layers:
            self.frozen = FrozenLayers(self.model, vars(self.hparams), train_loader.dataset.rows)
            self.frozen.fill(self.device)
        super().train(train_loader, valid_loader)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters of the encoder (if any) and of all other modules."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": []}
        encoder = {id(parameter) for parameter in self.model.encoder.parameters()}  # whatever --compile calls them
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                groups["encoder" if id(parameter) in encoder else "head"].append(parameter)
        return groups

    def compute_forward(self, batch: Any, stage: sb.Stage, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities [batch, frames, labels] and frame lengths [batch]; `options` go to the model."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        if stage == sb.Stage.TRAIN and self.frozen is not None:
            options["done"] = self.frozen.of_batch(batch), self.frozen.count
        elif stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.augment(wavs, wav_lens)
        # Validation bypasses DistributedDataParallel, which would synchronise the processes at every batch.
        return (self.modules["model"] if stage == sb.Stage.TRAIN else self.model)(wavs, wav_lens, **options)

    def compute_objectives(self, predictions: tuple, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the CTC loss; outside training, also count word errors."""
        log_probs, frame_lengths = predictions
        if stage != sb.Stage.TRAIN:
            self.count(batch.text, greedy_texts(log_probs, frame_lengths, self.model.labels))
        return ctc_loss(log_probs, frame_lengths, batch)


def ctc_loss(log_probs: torch.Tensor, frame_lengths: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return the mean CTC loss of log-probabilities [batch, frames, labels] with lengths [batch] for the batch's `tokens`."""
    tokens, token_lens = batch.tokens
    targets = (token_lens * tokens.shape[1]).round().long()
    return nn.functional.ctc_loss(
        log_probs.transpose(0, 1), tokens, frame_lengths, targets, CharacterLabels.blank_index, zero_infinity=True
    )
