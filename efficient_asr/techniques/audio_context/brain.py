"""AudioContextBrain: trains a Whisper to match its own states without the silence behind the audio. See `context.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr.data import Row, Rows, absolute_lengths
from efficient_asr.models.hub import model_source
from efficient_asr.models.sources import fingerprint
from efficient_asr.models.whisper.decoding import DecodingOptions
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.audio_context.context import AudioContext, States, context_loss
from efficient_asr.techniques.audio_context.targets import Targets, audio_positions, file_name
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils import distributed
from efficient_asr.utils.errors import UserError, did_you_mean

TRAINED = ("all", "encoder", "layers")  # values of `trained_layers`


class AudioContextBrain(WhisperBrain):
    """Train a Whisper on audio, without texts, to encode each utterance on its own length.

    The texts of training and validation are those that `source` hears with its whole window; validation WER is measured
    against them.
    """

    needs_text, filled_before_training = False, ("targets_folder",)
    validates_by = (*WhisperBrain.validates_by, "context_padding_s")
    checkpoints_activations = False

    @staticmethod
    def baseline_source(hparams: dict[str, Any]) -> str | None:
        """Return None: the untrained model is not a result of this technique."""
        return None

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load `source`, choose the layers that learn, and let it encode the audio's own length."""
        _check(hparams)
        model = super().build(hparams, rows)
        model.encoder_padding = AudioContext(hparams["context_padding_s"])
        model.history["training"]["audio_s"] = float(rows.durations.sum())
        return model

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Freeze what `trained_layers` does not name."""
        encoder = model.network.model.encoder
        if hparams["trained_layers"] != "all":
            model.network.requires_grad_(False)
            encoder.layers.requires_grad_(True)
            encoder.layer_norm.requires_grad_(True)
        if hparams["trained_layers"] == "layers":
            model.network.model.decoder.layers.requires_grad_(True)
        return model

    @staticmethod
    def check_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Replace the texts by those of the teacher, running it where that was not done before."""
        known = {row["id"] for row in WhisperBrain.check_rows(model, rows.map(_without_text), hparams, skipped_file)}
        rows = rows.select([i for i, row in enumerate(rows) if row["id"] in known])
        source, language = model_source(hparams["source"]), model.labels.default_language
        room = model.network.config.max_target_positions - model.labels.prompt_length - 1
        limits = {"max_new_tokens": room, "max_tokens_per_s": hparams["max_tokens_per_s"], "cut_loops": True}
        targets = Targets(Path(hparams["targets_folder"]), {"model": fingerprint(source)} | limits)
        teacher = Whisper.from_source(source, with_padding=False)
        teacher.labels.default_language = language
        share = distributed.share(len(rows))
        asked = targets.fill(teacher, rows.select(share), DecodingOptions(**limits), hparams["run_device"])
        (total,) = map(round, distributed.all_reduce([float(asked)]))  # acts as a barrier
        print(f"{targets.store.folder}: ran the teacher on {total} utterances, {len(rows) - total} were there already")
        return WhisperBrain.check_rows(model, targets.with_text(rows, teacher), hparams, skipped_file)

    check_valid_rows = check_rows

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Open the teacher's states, and load its output layer, which makes logits of them; then train."""
        self.targets = Targets(Path(self.hparams.targets_folder), None)
        teacher = Whisper.from_source(model_source(self.hparams.source), with_padding=False)
        self.teacher_output = teacher.network.proj_out.weight.detach().to(self.device)
        language = self.model.labels.default_language
        self.names = {row["id"]: file_name(row, language) for row in train_loader.dataset.rows}
        super().train(train_loader, valid_loader)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Any:
        """Return the student's States in training, and next-token logits otherwise."""
        if stage != sb.Stage.TRAIN:
            return super().compute_forward(batch, stage)
        batch = batch.to(self.device)
        wavs, wav_lens = batch.wav
        padding, (low, high) = self.model.encoder_padding, self.hparams.training_padding_s
        deployed, padding.padding_s = padding.padding_s, low + (high - low) * float(torch.rand(()))
        try:
            lengths = absolute_lengths(wavs, wav_lens)
            return States(*self.modules["model"](wavs, lengths, batch.tokens[0][:, :-1], with_states=True))
        finally:
            padding.padding_s = deployed

    def compute_objectives(self, predictions: Any, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss of `context_loss`; outside training, the cross-entropy of the teacher's text, and count word errors."""
        if stage != sb.Stage.TRAIN:
            return super().compute_objectives(predictions, batch, stage)
        stored = self.targets.read([self.names[utterance] for utterance in batch.id])
        encoder, decoder = (states.to(self.device) for states in stored)
        with torch.autocast(encoder.device.type, enabled=False):  # half precision would round more than models differ
            teacher = States(encoder, decoder, decoder[:, :, -1] @ self.teacher_output.T)
        positions = audio_positions(self.model, absolute_lengths(*batch.wav))
        count = int(positions.max())
        real = torch.arange(count)[None] < positions[:, None]
        tokens = torch.arange(decoder.shape[1])[None] < (self.token_lengths(batch).cpu() - 1)[:, None]
        weights = (self.hparams.encoder_weight, self.hparams.decoder_weight, self.hparams.logits_weight)
        student = States(predictions.encoder[:, :count], predictions.decoder, predictions.logits)
        loss = context_loss(student, teacher, real.to(self.device), tokens.to(self.device), weights)
        # DistributedDataParallel must see every output in every step, also one with a weight of 0
        return (
            loss + 0 * (predictions.logits.sum() + predictions.decoder.sum()) if distributed.world_size() > 1 else loss
        )


def _without_text(row: Row) -> Row:
    return {**row, "text": ""}


def _check(hparams: dict[str, Any]) -> None:
    """Reject settings that make no sense together, before anything is loaded.

    Raises
    ------
    UserError
        Naming the key.
    """
    if not hparams["source"]:
        raise UserError("source: this recipe adapts a trained Whisper; give its folder or hub id")
    if hparams["trained_layers"] not in TRAINED:
        raise UserError(
            f"trained_layers: '{hparams['trained_layers']}' is not one of {', '.join(TRAINED)}."
            f"{did_you_mean(str(hparams['trained_layers']), TRAINED)}"
        )
    bounds = hparams["training_padding_s"]
    numbers = isinstance(bounds, list) and all(type(bound) in (int, float) for bound in bounds)
    if not numbers or len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise UserError(f"training_padding_s: {bounds!r} is not a range of seconds such as [0.0, 1.0]")
    if not any(hparams[key] for key in ("encoder_weight", "decoder_weight", "logits_weight")):
        raise UserError("encoder_weight, decoder_weight, logits_weight: all are 0, so there is nothing to learn")
    if hparams["freeze_encoder"]:
        raise UserError("freeze_encoder: it is the encoder that must learn; set it to False")
    augment = hparams["augment"]
    if augment.speed is not None or len(augment.rirs) or len(augment.noises):
        raise UserError("speeds_percent, noise_manifest, rir_manifest: the teacher heard the audio unchanged; set none")
