r"""StudentBrain: distils a Whisper into one with fewer layers.

Gandhi, von Platen, Rush: "Distil-Whisper: Robust Knowledge Distillation via Large-Scale Pseudo Labelling" (arXiv 2311.00430).
With pseudo-labels :math:`\hat y` of the teacher (`pseudo_labelling`) and the distributions :math:`t, s` of teacher and student at
temperature :math:`T`, averaged over the tokens after the prompt,

.. math::
    L = \alpha_{CE} \, CE(\hat y) + \alpha_{KL} \, T^2 \, KL(t \,\Vert\, s)
      + \frac{\alpha_{h}}{n d} \sum_{i = 1}^{n} \lVert h^s_i - h^t_{\phi(i)} \rVert^2,

where :math:`h_i` is the output of decoder layer :math:`i`, of width :math:`d`, and the student's layer :math:`i` answers for all
the teacher's layers up to the next one that was kept: :math:`\phi(i) = l_{i+1} - 1`, the last layer for :math:`i = n`.

The encoder is frozen. Where student and teacher have the same encoder, it runs once for both; with `encoder_states_folder`, once
for all epochs.

Deviations: the paper's text and its published code exchange the two weights; as the code, the default is 0.8 for the labels and
1.0 for the divergence. Which targets have timestamps is fixed for an utterance instead of drawn anew (`targets.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch.utils.data import DataLoader

from efficient_asr.data import SAMPLE_RATE, Row, Rows, absolute_lengths
from efficient_asr.models.hub import model_source
from efficient_asr.models.loading import local_config
from efficient_asr.models.whisper.decoding import Encoded
from efficient_asr.models.whisper.greedy import Decoder
from efficient_asr.models.whisper.model import Whisper
from efficient_asr.techniques.distil_whisper.states import EncoderStates
from efficient_asr.techniques.distil_whisper.targets import check_targets, with_targets
from efficient_asr.techniques.distillation.brain import LOSS, DistillingBrain
from efficient_asr.techniques.distillation.losses import TeacherDistribution
from efficient_asr.techniques.distillation.teacher import Teacher, TeacherCache
from efficient_asr.techniques.pruning import kept_layers, prune
from efficient_asr.training.whisper import WhisperBrain
from efficient_asr.utils.errors import UserError


class StudentBrain(DistillingBrain):
    """Distil a Whisper into one with fewer layers, from pseudo-labels and, with `teacher`, from its distributions."""

    filled_before_training = ("teacher_cache", "encoder_states_folder")

    @classmethod
    def build(cls, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Load `source` and remove layers."""
        _check(hparams)
        return super().build(hparams, rows)

    @classmethod
    def adapt(cls, model: Whisper, hparams: dict[str, Any], rows: Rows) -> Whisper:
        """Remove layers."""
        prune(model, hparams["encoder_layers"], hparams["decoder_layers"])
        cut = {**_made_before(hparams["source"]), **model.history.get("pruning", {})}
        if hparams["freeze_encoder"] and "kept_encoder_layers" in cut:
            raise UserError("encoder_layers: an encoder with fewer layers has to learn; set freeze_encoder to False")
        config = model.network.config
        model.technique = "distil_whisper"
        model.label = f"student {config.encoder_layers}-{config.decoder_layers}"
        return model

    @staticmethod
    def training_details(model: Any) -> dict[str, Any]:
        """Return which layers were kept."""
        return model.history.get("pruning", {})

    @staticmethod
    def check_rows(model: Whisper, rows: Rows, hparams: dict[str, Any], skipped_file: Path) -> Rows:
        """Turn the texts into targets, and reject those that do not fit."""
        shares = (hparams["timestamp_probability"], hparams["previous_text_probability"])
        check_targets(rows, *shares, has_timestamps=bool(len(model.labels.timestamp_tokens)))
        return WhisperBrain.check_rows(model, with_targets(rows, *shares, hparams["seed"]), hparams, skipped_file)

    def train(self, train_loader: DataLoader, valid_loader: DataLoader) -> None:
        """Compute the encoder states that are missing, then train."""
        self.states, self.shares_encoder = None, False
        if self.hparams.encoder_states_folder:
            self.states = EncoderStates(Path(self.hparams.encoder_states_folder), self.model, train_loader.dataset.rows)
            self.states.fill(self.device)
        super().train(train_loader, valid_loader)

    def on_fit_start(self) -> None:
        """Compare student and teacher: whether they have the same encoder, and which of their layers correspond."""
        super().on_fit_start()
        if self.teacher is None or isinstance(self.teacher, TeacherCache):
            return
        if self.hparams.freeze_encoder:
            self.shares_encoder = self.model.has_encoder_of(self.teacher.model)
            print(
                f"the teacher {'shares the encoder of the student' if self.shares_encoder else 'runs its own encoder'}"
            )
        if self.hparams.hidden_weight:
            wanted = _made_before(self.hparams.source).get("kept_decoder_layers", self.hparams.decoder_layers)
            self.matched = matched_layers(self.model, self.teacher.model, wanted)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Any:
        """Return next-token logits [batch, tokens - 1, vocabulary]; in training, keep the states that they came from."""
        if stage != sb.Stage.TRAIN:
            return super().compute_forward(batch, stage)
        batch = batch.to(self.device)
        wavs, wav_lens = self.hparams.augment(*batch.wav)
        lengths = absolute_lengths(wavs, wav_lens)
        self.heard, self.encoded = (wavs, lengths), self._encode(batch, wavs, lengths)
        tokens, with_states = batch.tokens[0][:, :-1], bool(self.hparams.hidden_weight)
        out = self.modules["model"](wavs, lengths, tokens, self.token_lengths(batch) - 1, with_states, self.encoded)
        if not with_states:
            return out
        _, self.student_states, logits = out
        return logits

    def _encode(self, batch: Any, wavs: torch.Tensor, lengths: torch.Tensor) -> Encoded | None:
        """Return the states of a frozen encoder; None if the encoder learns."""
        if self.states is not None:
            return Encoded(self.states.read(batch.id).to(self.device), lengths)
        if not self.hparams.freeze_encoder:
            return None
        self.model.network.model.encoder.eval()
        with torch.no_grad():
            return self.model.encode(wavs, lengths)

    def states_for(self, teacher: Teacher) -> Callable[[Row], Encoded] | None:
        """Return what reads the states of a row, if student and teacher have the same encoder."""
        if self.states is None or not self.model.has_encoder_of(teacher.model):
            return None

        def read(row: Row) -> Encoded:
            samples = torch.tensor([round(row["duration"] * SAMPLE_RATE)], device=self.device)
            return Encoded(self.states.read([row["id"]]).to(self.device), samples)

        return read

    def ask(self, batch: Any) -> TeacherDistribution:
        """Return the teacher's distribution for a batch; it reuses the student's encoder states if it has the same encoder."""
        if isinstance(self.teacher, TeacherCache):
            return super().ask(batch)
        tokens, teacher = batch.tokens[0][:, :-1], self.teacher.model.to(self.device)
        with torch.no_grad():
            encoded = self.encoded if self.shares_encoder else teacher.encode(*self.heard)
            self.teacher_states: list[torch.Tensor] = []
            if self.hparams.hidden_weight:
                logits = Decoder(teacher.network, encoded, tokens.shape[1]).step(tokens, self.teacher_states)
            else:
                logits = teacher.predict(encoded, tokens)
        temperature = self.model.training_modules[LOSS].temperature
        return TeacherDistribution((logits.float() / temperature).log_softmax(dim=-1))

    def compute_objectives(self, predictions: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Return the loss of the module docstring; outside training, the cross-entropy."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage != sb.Stage.TRAIN:
            return loss
        if self.teacher is None:
            return self.hparams.ce_weight * loss
        if not self.hparams.hidden_weight:
            return loss
        matched = torch.stack([self.teacher_states[place] for place in self.matched], dim=2)
        difference = (self.student_states[:, :, 1:] - matched)[self.predicted(batch)]
        return loss + self.hparams.hidden_weight * difference.pow(2).mean()


def matched_layers(student: Whisper, teacher: Whisper, decoder_layers: int | list[int]) -> list[int]:
    """Return which of the teacher's decoder states (0: the input of layer 1) each layer of the student is matched with.

    Arguments
    ---------
    student, teacher : Whisper
        The models.
    decoder_layers : int or list of int
        The value of the YAML file, or what a student that was made before remembers; -1: layers as far apart as possible.

    Raises
    ------
    UserError
        If their layers do not correspond.
    """
    own, count = (len(model.network.model.decoder.layers) for model in (student, teacher))
    kept = [] if own > count else kept_layers(own if decoder_layers == -1 else decoder_layers, count, "decoder_layers")
    widths = [model.network.config.d_model for model in (student, teacher)]
    if len(kept) != own or widths[0] != widths[1]:
        raise UserError(
            f"hidden_weight: {own} layers of width {widths[0]} cannot be matched with {count} of width {widths[1]}; set it to 0, "
            "or use the teacher that the student's layers come from"
        )
    return [*kept[1:], count]


def _about(source: str) -> dict[str, Any]:
    """Return what a model folder says about its training; an empty dictionary if it says nothing."""
    about = local_config(model_source(source)).get("about")
    return about if isinstance(about, dict) else {}


def _made_before(source: str) -> dict[str, Any]:
    """Return which layers an untrained student kept (make_student.py); an empty dictionary for any other model."""
    about = _about(source)
    if about.get("technique") not in (None, "none"):
        return {}
    details = about.get("details")
    return details.get("pruning", {}) if isinstance(details, dict) else {}


def _check(hparams: dict[str, Any]) -> None:
    """Reject settings that make no sense together, before anything is loaded.

    Raises
    ------
    UserError
        Naming the keys.
    """
    if not hparams["source"]:
        raise UserError("source: this recipe makes a student of a trained Whisper; give its folder or hub id")
    if not hparams["kl_weight"] and not hparams["hidden_weight"]:
        hparams["teacher"] = None  # labels only
    if not hparams["teacher"] and not hparams["ce_weight"]:
        raise UserError("ce_weight, kl_weight, teacher: without a teacher or weights there is nothing to learn")
    if hparams["hidden_weight"] and (hparams["teacher_cache"] or not hparams["teacher"]):
        raise UserError("hidden_weight: a cache has no hidden states; set teacher, and teacher_cache to null")
    if hparams["hidden_weight"] and hparams["activation_checkpointing"]:
        raise UserError("activation_checkpointing: not with hidden_weight, whose states are kept; set it to False")
    if hparams["sigma"] is not None or hparams["learn_sigma"]:
        raise UserError("sigma, learn_sigma: the weights are ce_weight and kl_weight here")
    student = _about(hparams["source"]).get("technique") == "distil_whisper" or _made_before(hparams["source"])
    if hparams["teacher"] == hparams["source"] and student:
        raise UserError("teacher: the source is a student itself; set teacher to the Whisper that it was made of")
    if hparams["train_normaliser"] != "none" and hparams["timestamp_probability"]:
        raise UserError("train_normaliser: timed segments are not normalised; set timestamp_probability to 0")
    if hparams["spec_augment"] and hparams["freeze_encoder"]:
        raise UserError(
            "spec_augment: the encoder is frozen, and the teacher would hear the masks too; set it to False"
        )
    if hparams["encoder_states_folder"]:
        augment = hparams["augment"]
        if not hparams["freeze_encoder"]:
            raise UserError(
                "encoder_states_folder: the encoder learns, so its states change; set freeze_encoder to True"
            )
        if augment.speed is not None or len(augment.rirs) or len(augment.noises):
            raise UserError(
                "encoder_states_folder: states of the audio as it is; set no speeds_percent, noise_manifest, rir_manifest"
            )
